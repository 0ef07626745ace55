"""The rules of the reference, number by number as the contract writes them, each operation rounded to fp32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.embeddings.backends import optimizers
from thresher.embeddings.kernels.reference_rules import apply_rule, column_sums
from thresher.embeddings.kernels.rules import UpdateRule
from thresher.embeddings.kernels.segments import segment_sums
from thresher.embeddings.optimizers import TableOptimizer

F = np.float32
WIDTHS = (2, 16, 18, 64, 130)


def sum_of_columns(values: list[np.float32]) -> np.float32:
    """16 partial sums, then pairwise."""
    sums = [F(0)] * 16
    for column, value in enumerate(values):
        sums[column % 16] = sums[column % 16] + value
    for half in (8, 4, 2, 1):
        sums = [sums[k] + sums[k + half] for k in range(half)]
    return sums[0]


def row_by_hand(
    rule: UpdateRule, x: np.ndarray, g: np.ndarray, s: np.float32, vectors: list[np.ndarray]
) -> tuple[list[np.float32], np.float32, list[list[np.float32]]]:
    """New (x, s, vectors) of one row, a number at a time."""
    lr, eps, wd = F(rule.lr), F(rule.eps), F(rule.weight_decay)
    b1, b2, o1, o2 = F(rule.beta1), F(rule.beta2), F(1 - rule.beta1), F(1 - rule.beta2)
    c1, c2, l1, l2, beta = F(rule.correction1), F(rule.correction2), F(rule.l1), F(rule.l2), F(rule.ftrl_beta)
    width = len(x)
    if rule.weight_decay and rule.decay == "l2":
        g = [g[j] + wd * x[j] for j in range(width)]
    if rule.weight_decay and rule.decay == "decoupled":
        x = [x[j] * F(1 - rule.lr * rule.weight_decay) for j in range(width)]
    mean = sum_of_columns([g[j] * g[j] for j in range(width)]) / F(width)
    if rule.name == "rowwise_adagrad":
        s = s + mean
    if rule.name == "rowwise_adam":
        s = b2 * s + o2 * mean
    new, kept = [], []
    for j in range(width):
        v = [vector[j] for vector in vectors]
        match rule.name:
            case "sgd":
                new.append(x[j] - lr * g[j])
            case "adagrad":
                v = [v[0] + g[j] * g[j]]
                new.append(x[j] - (lr * g[j]) / (np.sqrt(v[0]) + eps))
            case "rowwise_adagrad":
                new.append(x[j] - (lr / (np.sqrt(s) + eps)) * g[j])
            case "adam":
                v = [b1 * v[0] + o1 * g[j], b2 * v[1] + o2 * (g[j] * g[j])]
                new.append(x[j] - (lr * (v[0] * c1)) / (np.sqrt(v[1] * c2) + eps))
            case "rowwise_adam":
                v = [b1 * v[0] + o1 * g[j]]
                new.append(x[j] - (lr * (v[0] * c1)) / (np.sqrt(s * c2) + eps))
            case "ftrl":
                before = np.sqrt(v[1])
                n = v[1] + g[j] * g[j]
                q = np.sqrt(n)
                z = (v[0] + g[j]) - ((q - before) / lr) * x[j]
                v = [z, n]
                new.append(F(0) if abs(z) <= l1 else (np.sign(z) * l1 - z) / ((beta + q) / lr + l2))
        kept.append(v)
    return new, s, [list(each) for each in zip(*kept, strict=True)]


@settings(max_examples=150)
@given(optimizers(), st.integers(0, 1 << 30), st.sampled_from(WIDTHS), st.integers(1, 50))
def test_rules_are_those_of_the_contract_to_the_last_bit(
    settings: TableOptimizer, seed: int, width: int, step: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 1, width, generator=generator)
    s = torch.rand(1, generator=generator) * settings.has_scalar
    vectors = [torch.rand(1, width, generator=generator) for _ in range(settings.vectors)]
    rule = settings.rule(0.07, step)
    expected_x, expected_s, expected_vectors = row_by_hand(
        rule, x[0].numpy(), g[0].numpy(), s[0].numpy()[()], [vector[0].numpy() for vector in vectors]
    )
    new, scalar, kept = apply_rule(rule, x, g, s, vectors, width)
    assert new[0].tolist() == [float(value) for value in expected_x]
    assert scalar.item() == expected_s
    assert [vector[0].tolist() for vector in kept] == [[float(v) for v in vector] for vector in expected_vectors]


def test_roots_are_rounded_once() -> None:
    """A row so wide that torch would hand its roots to MKL, whose last bit is not always right."""
    rule = TableOptimizer(name="adagrad", eps=1e-8).rule(1.0, 1)
    v = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0))
    g = torch.full_like(v, 2.0**-60)
    new, _, _ = apply_rule(rule, torch.zeros_like(v), g, torch.zeros(1), [v], v.shape[1])
    assert np.array_equal(new.numpy(), -(g.numpy() / (np.sqrt(v.numpy()) + F(1e-8))))


@pytest.mark.parametrize("width", [1, 15, 16, 17, 128, 200])
def test_columns_are_added_in_16_partial_sums(width: int) -> None:
    values = torch.randn(9, width, generator=torch.Generator().manual_seed(width)) ** 3
    assert column_sums(values).tolist() == [float(sum_of_columns(list(row.numpy()))) for row in values]


def test_sums_over_whole_rows_may_come_from_elsewhere() -> None:
    rule = TableOptimizer(name="rowwise_adagrad").rule(0.1, 1)
    x, g = torch.zeros(1, 4), torch.ones(1, 4)
    _, scalar, _ = apply_rule(rule, x, g, torch.zeros(1), [], width=8, sums=torch.tensor([32.0]))
    assert scalar.item() == 4.0


@settings(max_examples=50)
@given(st.lists(st.integers(0, 300), max_size=12), st.integers(1, 40))
def test_segments_are_added_up_in_order(counts: list[int], width: int) -> None:
    """Values of very different size, so that another order gives other sums."""
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(sum(counts), width, generator=generator) * torch.logspace(-4, 4, sum(counts)).unsqueeze(1)
    ends = torch.tensor(counts, dtype=torch.int64).cumsum(0)
    sums = segment_sums(values, torch.tensor(counts, dtype=torch.int64))
    for segment, end in enumerate(ends.tolist()):
        total = np.zeros(width, np.float32)
        for row in values[end - counts[segment] : end].numpy():
            total = total + row
        assert np.array_equal(sums[segment].numpy(), total)
