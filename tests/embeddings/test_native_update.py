"""The compiled updates do what the reference does, to the last bit, on every instruction set and number of threads."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.embeddings.backends import Case, assert_same, cases
from thresher.embeddings.kernels.native.backend import Native
from thresher.embeddings.kernels.native.library import Library, load

AVX512, AVX2, SCALAR = 2, 1, 0


@pytest.fixture(scope="module")
def library() -> Library:
    found = load()
    assert found is not None, "build the kernels: make setup"
    return found


@pytest.fixture(autouse=True)
def as_before(library: Library) -> Iterator[None]:
    level, threads = library.isa, torch.get_num_threads()
    yield
    library.set_isa(level)
    torch.set_num_threads(threads)


def check(case: Case, library: Library, level: int, threads: int) -> None:
    library.set_isa(level)
    torch.set_num_threads(threads)
    assert_same(case, Native(library))


@pytest.mark.parametrize("level", [AVX512, AVX2, SCALAR])
def test_equals_the_reference(library: Library, level: int) -> None:
    @settings(deadline=None, max_examples=60)
    @given(cases(), st.integers(1, 3))
    def run(case: Case, threads: int) -> None:
        check(case, library, level, threads)

    run()
