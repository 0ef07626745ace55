"""Libraries that do not fit together."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thresher.errors import VersionError
from thresher.pins import PINS
from thresher.versions import check_installed, installed, is_command_line, versions


def lookup(**changes: str) -> Callable[[str], str]:
    found = PINS | {"fbgemm-gpu-cpu": PINS["fbgemm-gpu"]} | {key.replace("_", "-"): v for key, v in changes.items()}
    return lambda name: found.get(name, "")


def test_the_pinned_versions_fit() -> None:
    check_installed(lookup())
    check_installed(lookup(fbgemm_gpu_cpu=""))


@pytest.mark.parametrize("changes", [{"torch": "2.12.0"}, {"torchrec": ""}, {"fbgemm_gpu": "1.9.0"}])
def test_a_misfit_names_the_three_versions_that_fit(changes: dict[str, str]) -> None:
    with pytest.raises(VersionError) as caught:
        check_installed(lookup(**changes))
    for name in ("torch", "torchrec", "fbgemm-gpu"):
        assert f"{name} {PINS[name]}" in caught.value.fix
    name, found = next(iter(changes.items()))
    assert f"{name.replace('_', '-')} {found or 'absent'}" in caught.value.what


def test_the_cpu_build_of_fbgemm_counts() -> None:
    with pytest.raises(VersionError, match=r"fbgemm-gpu-cpu 1\.9\.0"):
        check_installed(lookup(fbgemm_gpu_cpu="1.9.0"))


def test_versions_name_the_pinned_libraries() -> None:
    assert versions()["torch"] == PINS["torch"]
    assert set(PINS) < set(versions())
    assert installed("no-such-distribution-of-that-name") == ""


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["python", "/venv/bin/thresher", "train"], True),
        (["python", "-m", "thresher.launch.worker", "x.yaml"], True),
        (["python", "-m", "pytest"], False),
        (["python", "train.py"], False),
        (["python"], False),
        (["python", "-m"], False),
    ],
)
def test_the_command_line_checks_by_itself(argv: list[str], answer: bool) -> None:
    assert is_command_line(argv) is answer


def misfit_in(folder: Path) -> dict[str, str]:
    """An environment in which torchrec seems to have another version."""
    info = folder / "torchrec-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchrec\nVersion: 0.1\n")
    return {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}


def test_import_of_the_package_fails_at_once_on_a_misfit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import thresher"], env=misfit_in(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "VersionError: installed packages: these libraries do not fit together" in done.stderr
    assert "torchrec 0.1" in done.stderr


def test_commands_print_a_misfit_as_a_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thresher.launch.cli", "train", "x.yaml"]
    done = subprocess.run(command, env=misfit_in(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("VersionError: installed packages:")
    assert "Traceback" not in done.stderr


def test_doctor_diagnoses_a_misfit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thresher.launch.cli", "doctor"]
    done = subprocess.run(command, env=misfit_in(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "fail" in done.stdout
    assert "torchrec 0.1" in done.stdout
    assert f"torchrec {PINS['torchrec']}" in done.stdout
    assert "Does not work: versions" in done.stdout
