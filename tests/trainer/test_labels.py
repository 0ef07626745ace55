"""Which label a run learns, and that measuring it leaves no trace: whole runs on rows whose labels differ plainly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.multi.harness import run_ranks
from thresher.data.dataset import Dataset
from thresher.data.schema import Schema
from thresher.data.writer import DatasetWriter
from thresher.trainer.assemble import assemble
from thresher.trainer.run import restore, train
from thresher.trainer.world import World
from thresher.zoo.registry import RunConfig

DEADLINE_S = 120.0
SCHEMA = {
    "name": "labels",
    "tables": [{"name": "items", "rows": 10, "ids": "index"}],
    "features": [
        {"kind": "sparse", "name": "item", "table": "items"},
        {"kind": "dense", "name": "x"},
        {"kind": "label", "name": "noise"},
        {"kind": "label", "name": "clear"},
        {"kind": "label", "name": "value", "task": "regression"},
        {"kind": "weight", "name": "importance"},
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """``clear`` and ``value`` follow from the item; ``noise`` from nothing; every fifth row is wrong and weighs 0."""
    folder = tmp_path_factory.mktemp("labels") / "data"
    writer = DatasetWriter(folder, Schema.model_validate(SCHEMA), "made", {})
    rng = np.random.default_rng(0)
    for split, rows in (("train", 2000), ("valid", 203), ("test", 101)):
        item = rng.integers(0, 10, rows)
        wrong = np.arange(rows) % 5 == 0
        columns = {
            "item": item,
            "x": np.zeros(rows, np.float32),
            "noise": rng.integers(0, 2, rows).astype(np.float32),
            "clear": ((item >= 5) ^ wrong).astype(np.float32),
            "value": np.where(wrong, 1e3, item / 10).astype(np.float32),
            "importance": np.where(wrong, 0, 1).astype(np.float32),
        }
        writer.write(split, pa.table(columns))
    writer.finish({})
    return folder


def weights_of(rank: int, world: int, data: Path, run_dir: Path, model: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Trains; the weights it ends with, by name."""
    values: dict[str, Any] = {
        "name": "labels",
        "run_dir": str(run_dir),
        "data": {"path": str(data)},
        "model": model,
        "train": {"batch_size": 40, "epochs": 2, "log_every": 10},
        "optim": {"dense": {"lr": 0.05}, "tables": {"lr": 0.3}},
        "launch": {"processes": world},
        "tensorboard": False,
    } | changes
    config = RunConfig.model_validate(values)
    here = World(rank, world, rank, world, torch.device("cpu"))
    train(config, here)
    parts = assemble(config, here, Dataset.open(data))
    restore(parts)
    return {name: parameter.detach().clone() for name, parameter in parts.sharded.wrapped.named_parameters()}


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_the_second_label_alone_is_learnt_and_measured(data, tmp_path):
    run_ranks(2, weights_of, data, tmp_path, {"name": "lr", "labels": ["clear"]}, {}, timeout_s=DEADLINE_S)
    *_, test = records(tmp_path, "eval")
    assert test["metrics"]["auc"] == 1.0
    assert 0.9 < test["metrics"]["calibration"] < 1.1
    assert records(tmp_path, "train")[-1]["auc"] > 0.98
    assert not [name for name in test["metrics"] if "/" in name]


def test_labels_in_another_order_than_the_schema_and_of_another_task(data, tmp_path):
    model = {"name": "deepfm", "dim": 4, "mlp": {"hidden": [8]}, "labels": ["value", "clear"]}
    run_ranks(1, weights_of, data, tmp_path, model, {}, timeout_s=DEADLINE_S)
    metrics = records(tmp_path, "eval")[-1]["metrics"]
    assert metrics["mse"] < 0.03
    assert metrics["mae"] < 0.15
    assert metrics["clear/auc"] == 1.0
    assert records(tmp_path, "train")[-1]["auc"] is None


def test_measuring_in_between_leaves_no_trace_in_training(data, tmp_path):
    """Neither dropout that stays off nor random numbers that an evaluation uses up."""
    model = {"name": "deepfm", "dim": 4, "mlp": {"hidden": [8], "dropout": 0.5}}
    often = {"eval": {"every_steps": 3, "max_rows": 50}}
    never = {"data": {"path": str(data), "valid": "", "test": ""}}
    (one,) = run_ranks(1, weights_of, data, tmp_path / "often", model, often, timeout_s=DEADLINE_S)
    (two,) = run_ranks(1, weights_of, data, tmp_path / "never", model, never, timeout_s=DEADLINE_S)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name
