"""Real data sets that live beside the checkout; tests that need one are skipped where it is absent."""

import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest

ARCHIVES = Path(__file__).resolve().parents[2] / "shared" / "data"


@cache
def shared_dir(name: str) -> Path:
    """The unpacked archive ``name``; skips the calling test where there is no such archive."""
    archive = ARCHIVES / f"{name}.tar.xz"
    if not archive.exists():
        pytest.skip(f"real data set '{name}' is not beside this checkout")
    target = Path(tempfile.mkdtemp(prefix=f"thresher-{name}-"))
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    inner = [p for p in target.iterdir() if p.is_dir()]
    return inner[0] if len(inner) == 1 else target
