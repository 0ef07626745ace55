"""Runs over tables with raw ids."""

import json
from pathlib import Path

import pytest
import torch

from tests.multi.harness import run_ranks
from tests.trainer.test_run import Job, measure, run
from thresher.data.dataset import Dataset
from thresher.data.prepare import prepare
from thresher.data.recipes.synthetic import Synthetic
from thresher.errors import CheckpointError

DEADLINE_S = 150
CHANGES = {
    "data.valid": "",
    "data.test": "",
    "dynamic.sparse_0": {"min_count": 2, "evict_share": 0.1},
    "tiers": {"budget": "90%", "levels": ["fp32", "int8", "int4"], "flat_below_bytes": 0},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic rows whose first table has 60 rows for 100 raw ids."""
    root = tmp_path_factory.mktemp("data")
    prepare(Synthetic(rows=4000, sparse=2, many=0, sequences=0, table_rows=100, first_order=2.0), root / "data")
    (manifest,) = (path for path in (root / "data").glob("*.json") if '"tables"' in path.read_text())
    values = json.loads(manifest.read_text())
    schema = values["columns"] if "columns" in values else values["schema"]
    schema["tables"][0] |= {"ids": "raw", "rows": 60}
    manifest.write_text(json.dumps(values))
    assert Dataset.open(root / "data").schema.tables[0].ids == "raw"
    return root


@pytest.fixture
def root(data: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").symlink_to(data / "data")
    return tmp_path


def test_a_run_that_goes_on_ends_bit_equal_with_one_that_never_stopped(
    root: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("straight")
    (other / "data").symlink_to(data / "data")
    run_ranks(2, run, Job(root, CHANGES | {"train.max_steps": 7}), timeout_s=DEADLINE_S)
    resumed = run_ranks(2, run, Job(root, CHANGES | {"train.max_steps": 15}), timeout_s=DEADLINE_S)
    straight = run_ranks(2, run, Job(other, CHANGES | {"train.max_steps": 15}), timeout_s=DEADLINE_S)
    for a, b in zip(resumed, straight, strict=True):
        assert a.weights.keys() == b.weights.keys()
        for name, weight in a.weights.items():
            assert torch.equal(weight, b.weights[name]), name
    with pytest.raises(CheckpointError, match="has raw ids and was cut otherwise"):
        run_ranks(1, run, Job(root, CHANGES | {"train.max_steps": 20}), timeout_s=DEADLINE_S)


def test_an_evaluation_finds_the_rows_of_raw_ids(root: Path) -> None:
    changes = CHANGES | {"data.test": "test", "train.epochs": 3}
    run_ranks(1, run, Job(root, changes), timeout_s=DEADLINE_S)
    told = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    (test,) = [record for record in told if record["kind"] == "eval"]
    (measured,) = run_ranks(1, measure, Job(root, changes), "test", -1, timeout_s=DEADLINE_S)
    assert measured["auc"] == test["metrics"]["auc"] > 0.6
