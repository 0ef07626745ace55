"""The wheel, installed outside the checkout, holds everything the command needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMOKE = """
import pathlib, sys, thresher
from thresher.trainer.report import build
root = pathlib.Path(thresher.__file__).parent
assert root.is_relative_to(sys.argv[1]), root
for name in ("py.typed", "zoo/deepfm/README.md", "trainer/report/page/page.html", "trainer/report/page/page.css"):
    assert (root / name).is_file(), name
from thresher.embeddings.kernels.native.library import require
assert require().isa >= 0
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=280)
    (wheel,) = folder.glob("thresher-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=120
    )
    return folder / "site"


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=120)


def test_installed_files_are_complete(installed):
    done = run(installed, "-c", SMOKE, str(installed))
    assert done.returncode == 0, done.stderr


def test_installed_command_answers(installed):
    done = run(installed, "-m", "thresher.launch.cli", "--version")
    assert done.returncode == 0, done.stderr
    assert "thresher" in done.stdout
