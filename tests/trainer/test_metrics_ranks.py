"""Metrics over several gloo ranks equal those of one process, however samples are split."""

import numpy as np
import pytest
import torch

from tests.multi.harness import run_ranks
from thresher.trainer.metrics import BinaryMetrics, RankingMetrics, RegressionMetrics

Case = tuple[int, float, int]
"""Samples, share of whole-number scores (ties), number of groups."""

CASES: list[Case] = [(0, 0.0, 1), (1, 1.0, 1), (3, 1.0, 2), (200, 1.0, 5), (2000, 0.5, 300), (2000, 0.0, 2000)]


def data(case: Case) -> dict[str, torch.Tensor]:
    size, ties, groups = case
    rng = np.random.default_rng(size)
    logits = rng.normal(size=size).astype(np.float32)
    logits = np.where(rng.random(size) < ties, logits.round(), logits)
    return {
        "logits": torch.from_numpy(logits),
        "labels": torch.from_numpy(rng.integers(0, 2, size).astype(np.float32)),
        "weight": torch.from_numpy(rng.integers(0, 4, size).astype(np.float32)),
        "group": torch.from_numpy(rng.integers(-groups, groups, size) * 2**33),
    }


def split(size: int, world: int, how: str) -> list[np.ndarray]:
    """Which samples each rank holds: dealt in turn, sorted by number, or all on the last rank."""
    everything = np.arange(size)
    if how == "turns":
        return [everything[rank::world] for rank in range(world)]
    if how == "last":
        return [everything[:0]] * (world - 1) + [everything]
    return np.array_split(everything, world)


def metrics_of(parts: dict[str, torch.Tensor]) -> dict[str, float]:
    binary, regression, ranking = BinaryMetrics(grouped=True), RegressionMetrics(), RankingMetrics(at=(2,))
    for at in range(0, parts["logits"].numel(), 97):
        part = {name: column[at : at + 97] for name, column in parts.items()}
        binary.update(**part)
        regression.update(part["logits"], part["labels"], part["weight"])
        ranking.update(1 + part["logits"].abs(), part["weight"])
    return binary.compute() | regression.compute() | ranking.compute()


def all_cases(rank: int, world: int) -> list[dict[str, float]]:
    results = []
    for case in CASES:
        columns = data(case)
        for how in ("turns", "blocks", "last"):
            mine = torch.from_numpy(split(case[0], world, how)[rank])
            results.append(metrics_of({name: column[mine] for name, column in columns.items()}))
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_any_split_over_ranks_gives_the_result_of_one_process(world: int) -> None:
    answers = run_ranks(world, all_cases, timeout_s=120)
    alone = [metrics_of(data(case)) for case in CASES for _ in range(3)]
    for found in answers:
        assert repr(found) == repr(answers[0]), "all ranks decide on the same bits"
    for found, expected in zip(answers[0], alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert repr(found["auc"]) == repr(expected["auc"]), "whole-number weights are summed exactly"
