"""The compiled kernels are found, are those of these sources, and are not missed silently."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from thresher.embeddings.kernels.backend import pick_backend
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.native import library as native_library
from thresher.embeddings.kernels.native.backend import Native
from thresher.embeddings.kernels.native.library import Library, load, require, status
from thresher.embeddings.kernels.native.sources import FOLDER, LIBRARY, digest, sources
from thresher.embeddings.rows.flat import FlatTable
from thresher.errors import VersionError


@pytest.fixture
def copy(tmp_path) -> Path:
    """The kernels' folder somewhere else."""
    for path in [*sources(), FOLDER / LIBRARY]:
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """As if nothing had been built."""
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    load.cache_clear()
    yield
    load.cache_clear()


def test_this_checkout_has_its_kernels():
    assert load() is not None
    assert isinstance(pick_backend(torch.device("cpu")), Native)
    assert status() in {f"compiled, {name}" for name in ("scalar", "AVX2", "AVX-512")}


def test_instructions_are_limited_to_what_there_is():
    library = require()
    best = library.isa
    try:
        assert library.set_isa(0) == 0
        assert library.isa == 0
        assert library.set_isa(-3) == 0
    finally:
        assert library.set_isa(2) == best


def test_a_library_of_other_sources_is_refused(copy):
    assert Library(copy / LIBRARY).isa >= 0
    (copy / "abi.h").write_text((copy / "abi.h").read_text() + "\n")
    with pytest.raises(VersionError, match=r"not those of these sources. Build them anew: 'make setup'"):
        Library(copy / LIBRARY)


def test_a_library_without_sources_beside_it_is_taken(copy):
    for path in sources(copy):
        path.unlink()
    assert Library(copy / LIBRARY).isa >= 0


def test_a_file_that_is_no_library_is_refused(copy):
    (copy / LIBRARY).write_bytes(b"torn")
    with pytest.raises(VersionError, match="the compiled kernels do not load"):
        Library(copy / LIBRARY)


def test_without_a_library_the_reference_runs_after_one_warning(nowhere):
    with pytest.warns(UserWarning, match=r"many times slower; install a C\+\+17 compiler .* 'make setup'"):
        assert pick_backend(torch.device("cpu")).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_backend(torch.device("cpu")).name == "reference"
    assert "not built, a slow reference does their work" in status()
    with pytest.raises(VersionError, match="were not built"):
        require()


def test_the_digest_covers_names_and_contents(copy):
    before = digest(copy)
    assert before == digest()
    (copy / "abi.h").rename(copy / "abi2.h")
    assert digest(copy) != before


def test_a_build_without_compiler_says_so_and_succeeds(tmp_path):
    root = FOLDER.parents[3]
    arguments = ["build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=root,
        env={**os.environ, "CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++17 compiler could build the fast kernels (what it says is above); installing without" in done.stdout
    assert not list(tmp_path.rglob(LIBRARY))


def lookup_on_two_threads(library: Library) -> torch.Tensor:
    table = FlatTable("t", 100, 16, scalar=False, vectors=0)
    table.weights.copy_(torch.arange(1600.0).view(100, 16))
    bags = Bags(torch.arange(1000) % 100, torch.arange(0, 1001, 10), None, (0,), (100,), Pooling.SUM)
    return Native(library).lookup([table], bags)


def test_a_forked_child_has_threads_of_its_own():
    library, before = require(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = lookup_on_two_threads(library)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(lookup_on_two_threads(library), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(lookup_on_two_threads(library), expected)
    finally:
        torch.set_num_threads(before)
