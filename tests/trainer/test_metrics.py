"""Streaming metrics against loops over pairs and groups, and against scikit-learn."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from thresher.errors import MetricError
from thresher.trainer.metrics import BinaryMetrics, RankingMetrics, RegressionMetrics, binary

Sample = tuple[float, float, float, int]
SAMPLES = st.lists(
    st.tuples(
        st.sampled_from([-3.0, -0.5, -0.0, 0.0, 0.25, 0.5, 40.0]) | st.floats(-5, 5, width=32),
        st.sampled_from([0.0, 1.0]),
        st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        st.sampled_from([-7, 0, 1, 2, 2**40, -(2**62), 2**62]),
    ),
    max_size=40,
)


def oracle_auc(samples: list[Sample]) -> float:
    """Every pair of a positive and a negative, one by one."""
    won = total = 0.0
    for score, label, weight, _ in samples:
        for other, other_label, other_weight, _ in samples:
            if label == 1 and other_label == 0:
                pair = weight * other_weight
                total += pair
                won += pair * (1.0 if score > other else 0.5 if score == other else 0.0)
    return won / total if total else math.nan


def oracle_gauc(samples: list[Sample]) -> float:
    sums = impressions = 0.0
    for group in {g for *_, g in samples}:
        members = [s for s in samples if s[3] == group]
        value = oracle_auc(members)
        if not math.isnan(value):
            weight = sum(w for _, _, w, _ in members)
            sums += value * weight
            impressions += weight
    return sums / impressions if impressions else math.nan


def oracle_sums(samples: list[Sample]) -> dict[str, float]:
    weight = sum(w for _, _, w, _ in samples)
    clicks = sum(w * y for _, y, w, _ in samples)
    predicted = sum(w / (1 + math.exp(-z)) for z, _, w, _ in samples)
    loss = sum(w * (math.log1p(math.exp(-abs(z))) + max(z, 0) - y * z) for z, y, w, _ in samples)
    rate = clicks / weight if weight else 0.0
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate) if 0 < rate < 1 else math.nan
    logloss = loss / weight if weight else math.nan
    return {"logloss": logloss, "ne": logloss / entropy, "calibration": predicted / clicks if clicks else math.nan}


def columns(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, labels, weights, groups = zip(*samples, strict=True) if samples else ((), (), (), ())
    floats = [torch.tensor(c, dtype=torch.float32) for c in (scores, labels, weights)]
    return floats[0], floats[1], floats[2], torch.tensor(groups, dtype=torch.int64)


def measured(samples: list[Sample], batch: int) -> dict[str, float]:
    metrics = BinaryMetrics(grouped=True)
    for at in range(0, len(samples), batch):
        metrics.update(*columns(samples[at : at + batch]))
    return metrics.compute()


@settings(max_examples=200, deadline=None)
@given(samples=SAMPLES, batch=st.integers(1, 40))
def test_binary_metrics_equal_the_loops(samples: list[Sample], batch: int) -> None:
    found = measured(samples, batch)
    expected = {"auc": oracle_auc(samples), "gauc": oracle_gauc(samples)} | oracle_sums(samples)
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("compact_at", [0, 7, 100])
def test_compaction_on_the_way_changes_nothing(monkeypatch: pytest.MonkeyPatch, compact_at: int) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=400).round(1), rng.integers(0, 2, 400), rng.integers(0, 3, 400), rng.integers(0, 9, 400)
    samples = [(float(s), float(y), float(w), int(g)) for s, y, w, g in zip(*rows, strict=True)]
    monkeypatch.setattr(binary, "COMPACT_AT", compact_at)
    found = measured(samples, 13)
    assert found["auc"] == oracle_auc(samples)
    assert found["gauc"] == pytest.approx(oracle_gauc(samples), rel=1e-14)


def test_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=5000).astype(np.float32).round(2)
    labels = (rng.random(5000) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    weight = rng.random(5000).astype(np.float32)
    metrics = BinaryMetrics()
    for part in np.array_split(np.arange(5000), 7):
        metrics.update(*(torch.from_numpy(column[part]) for column in (logits, labels, weight)))
    found = metrics.compute()
    assert found["auc"] == pytest.approx(roc_auc_score(labels, logits, sample_weight=weight), rel=1e-12)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert found["logloss"] == pytest.approx(log_loss(labels, probability, sample_weight=weight), rel=1e-12)
    assert "gauc" not in found


def test_local_auc_is_that_of_this_process() -> None:
    metrics = BinaryMetrics()
    metrics.update(torch.tensor([0.1, 0.2, 0.2]), torch.tensor([0.0, 0.0, 1.0]))
    assert metrics.local_auc() == 0.75


def test_large_logits_stay_apart_where_probabilities_would_tie() -> None:
    metrics = BinaryMetrics()
    metrics.update(torch.tensor([40.0, 50.0, 60.0]), torch.tensor([0.0, 1.0, 1.0]))
    assert metrics.compute()["auc"] == 1.0
    assert metrics.compute()["logloss"] == pytest.approx(40 / 3)


def test_shares_of_a_positive_count_as_such() -> None:
    soft, hard = BinaryMetrics(), BinaryMetrics()
    soft.update(torch.tensor([0.3, -1.0]), torch.tensor([0.25, 0.5]))
    hard.update(
        torch.tensor([0.3, 0.3, -1.0, -1.0]), torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.25, 0.75, 0.5, 0.5])
    )
    assert soft.compute() == pytest.approx(hard.compute(), rel=1e-15)


@pytest.mark.parametrize(
    ("logit", "label", "weight", "message"),
    [
        (math.nan, 1.0, 1.0, "MetricError: sample 1 of a batch: prediction nan cannot be measured. The model diverged"),
        (math.inf, 1.0, 1.0, "prediction inf cannot be measured"),
        (0.0, math.nan, 1.0, "label nan cannot be measured"),
        (0.0, 2.0, 1.0, "label 2.0 cannot be measured. Binary labels are 0 or 1; declare 'task: regression'"),
        (0.0, 1.0, -1.0, "weight -1.0 cannot be measured. Weights are finite and >= 0"),
        (0.0, 1.0, math.nan, "weight nan cannot be measured"),
    ],
)
def test_what_cannot_be_measured_is_named(logit: float, label: float, weight: float, message: str) -> None:
    with pytest.raises(MetricError) as error:
        BinaryMetrics().update(torch.tensor([0.0, logit]), torch.tensor([0.0, label]), torch.tensor([1.0, weight]))
    assert message in error.value.message
    assert "sample 1 of a batch" in error.value.message


def test_samples_of_weight_0_may_hold_anything() -> None:
    metrics = BinaryMetrics(grouped=True)
    nothing = torch.tensor([math.nan, 0.5, -0.5])
    metrics.update(nothing, torch.tensor([math.nan, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]), torch.tensor([9, 1, 1]))
    found = metrics.compute()
    assert found["auc"] == found["gauc"] == 1.0
    assert found["calibration"] == pytest.approx(1.0)


def test_bfloat16_logits_and_wide_batches_are_taken() -> None:
    metrics = BinaryMetrics()
    metrics.update(torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16), torch.tensor([[1.0], [0.0]]))
    assert metrics.compute()["auc"] == 1.0


def test_regression_metrics() -> None:
    metrics = RegressionMetrics()
    metrics.update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0]), torch.tensor([1.0, 3.0]))
    metrics.update(torch.tensor([math.inf, 4.0]), torch.tensor([0.0, 4.0]), torch.tensor([0.0, 4.0]))
    assert metrics.compute() == {"mse": 28 / 8, "mae": 10 / 8}
    assert all(math.isnan(value) for value in RegressionMetrics().compute().values())


@settings(max_examples=60, deadline=None)
@given(
    ranked=st.lists(st.tuples(st.sampled_from([1.0, 1.5, 2.0, 10.0, 10.5, 11.0, math.inf]), st.integers(0, 3))),
    batch=st.integers(1, 9),
)
def test_ranking_metrics_equal_the_loop(ranked: list[tuple[float, int]], batch: int) -> None:
    metrics = RankingMetrics(at=(1, 10))
    for at in range(0, len(ranked), batch):
        ranks, weights = zip(*ranked[at : at + batch], strict=True)
        metrics.update(torch.tensor(ranks, dtype=torch.float64), torch.tensor(weights))
    weight = sum(w for _, w in ranked)

    def mean(gain: Callable[[float], float]) -> float:
        return sum(w * gain(r) for r, w in ranked) / weight if weight else math.nan

    expected = {"mrr": mean(lambda r: 1 / r)}
    for k in (1, 10):
        expected[f"hr@{k}"] = mean(lambda r, k=k: float(r <= k))
        expected[f"ndcg@{k}"] = mean(lambda r, k=k: 1 / math.log2(1 + r) if r <= k else 0.0)
    assert metrics.compute() == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("rank", [0.0, math.nan])
def test_what_is_no_rank_is_refused(rank: float) -> None:
    with pytest.raises(MetricError, match=rf"sample 1 of a batch: {rank} is no rank. Ranks are >= 1"):
        RankingMetrics().update(torch.tensor([1.0, rank]))
