"""The tests of the Triton backend on the CPU, in a process of their own: Triton reads the setting at import."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def interpreted(*choice: str, timeout_s: int) -> str:
    """What pytest prints about ``tests/gpu/test_triton.py`` with the interpreter on."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_triton.py", *choice],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_kernels_do_what_the_reference_does_in_the_interpreter() -> None:
    said = interpreted("-m", "not slow", timeout_s=550)
    assert "skipped" not in said
    assert "passed" in said


@pytest.mark.slow
@pytest.mark.timeout(3700)
def test_kernels_do_what_the_reference_does_in_many_drawn_cases() -> None:
    assert "1 passed" in interpreted("-m", "slow", timeout_s=3600)
