"""Held-out AUC of the three contestants: the same rows, the same batches in the same order, the same epochs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.ctr.contestants import NAMES, Task, contestant
from benchmarks.ctr.rows import Rows, loaded
from benchmarks.datasets import dataset
from benchmarks.summary import summary
from thresher.errors import DataError
from thresher.trainer.metrics import BinaryMetrics

BATCH = 256
TASKS = {
    "ml100k": {
        "lr": (Task("lr", lr=3e-3, table_lr=0.05), 6),
        "deepfm": (Task("deepfm", lr=1e-3, table_lr=0.04, dropout=0.2), 3),
        "dcnv2": (Task("dcnv2", lr=1e-3, table_lr=0.04, dropout=0.2), 3),
    },
    "criteo": {
        "lr": (Task("lr", lr=3e-3, table_lr=0.01), 4),
        "deepfm": (Task("deepfm", dim=8, hidden=(64, 32), lr=1e-3, table_lr=0.006, dropout=0.3), 2),
        "dcnv2": (Task("dcnv2", dim=8, hidden=(64, 32), lr=1e-3, table_lr=0.01, dropout=0.3), 2),
    },
}
"""Settings and epochs. Contestants differ in nothing but the tables' update rule, whose rate each has its own."""


def auc_table(names: Sequence[str], seeds: int) -> dict[str, Any]:
    """AUC on the test rows by data set, model and contestant: mean, extremes and spread over seeds.

    A data set whose source is not to be had is left out.
    """
    found: dict[str, Any] = {}
    for name in names:
        tasks = TASKS[name]
        try:
            data = dataset(name)
        except DataError:
            continue
        train, test = loaded(data, "train"), loaded(data, "test")
        found[name] = {
            model: {
                who: summary([trained_auc(who, task, train, test, epochs, seed) for seed in range(seeds)])
                for who in NAMES
            }
            for model, (task, epochs) in tasks.items()
        }
    return found


def trained_auc(who: str, task: Task, train: Rows, test: Rows, epochs: int, seed: int) -> float:
    """AUC on ``test`` after ``epochs`` passes over ``train``."""
    one = contestant(who, task, train.schema, seed)
    order = torch.Generator().manual_seed(seed)
    number = 0
    for _ in range(epochs):
        for part in train.batches(BATCH, torch.randperm(len(train), generator=order)):
            one.step(one.give(part), number)
            number += 1
    return auc(torch.cat([one.predict(part) for part in test.batches(4096, torch.arange(len(test)))]), test.labels)


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of scores [N] for labels [N]."""
    metrics = BinaryMetrics(False)
    metrics.update(scores, labels, torch.ones_like(labels), torch.zeros_like(labels, dtype=torch.int64))
    return metrics.compute()["auc"]


def auc_gaps(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far our mean AUC is above FuxiCTR's, by data set and model."""
    return {
        data: {model: ones["ours"]["mean"] - ones["fuxictr"]["mean"] for model, ones in models.items()}
        for data, models in found.items()
    }


def auc_rows(found: dict[str, Any]) -> list[list[object]]:
    """One line a model: mean and spread of each contestant."""
    return [
        [f"{data} {model}", *(value for who in NAMES for value in (ones[who]["mean"], ones[who]["spread"]))]
        for data, models in found.items()
        for model, ones in models.items()
    ]
