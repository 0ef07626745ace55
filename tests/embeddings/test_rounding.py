"""Stochastic rounding is unbiased where the nearest value is not, and keeps what is exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows import rounding
from thresher.embeddings.rows.generator import WEIGHTS, random_bits, row_keys, table_key
from thresher.embeddings.rows.rounding import (
    FP16_MAX,
    kept_scale,
    pack_int4,
    quantised,
    to_bf16,
    to_fp16,
    unit,
    unpack_int4,
)
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import LEVELS, Tier

ROUNDINGS = 4096
SIGMAS = 4.0

Rounding = Callable[[Tensor, Tensor | None], Tensor]


def scaled(tier: Tier) -> Rounding:
    scale = torch.tensor(0.013)

    def rounded(x: Tensor, bits: Tensor | None) -> Tensor:
        return scale * quantised(x, scale.expand(len(x)), tier, bits)

    return rounded


CASES: dict[str, tuple[Rounding, float, float]] = {
    "int8": (scaled(Tier.INT8), 0.1234, 0.013),
    "int8 below": (scaled(Tier.INT8), -0.1234, 0.013),
    "int4": (scaled(Tier.INT4), 0.0456, 0.013),
    "fp16": (to_fp16, 1.0 + 0.3 * 2**-10, 2.0**-10),
    "fp16 below": (to_fp16, -(1.0 + 0.3 * 2**-10), 2.0**-10),
    "fp16 subnormal": (to_fp16, 5.3 * 2.0**-24, 2.0**-24),
    "bf16": (to_bf16, -(1.0 + 0.7 * 2**-7), 2.0**-7),
}


def bits(rows: int, columns: int, step: int = 1) -> Tensor:
    return random_bits(row_keys(table_key(0, "t"), torch.arange(rows), step), columns, WEIGHTS)


def sigmas_off(rounded: Tensor, x: float) -> float:
    """How far the mean of roundings to two neighbours lies from x, in standard errors of an unbiased one."""
    low, high = rounded.min().item(), rounded.max().item()
    share = (x - low) / (high - low) if high > low else 0.5
    quantum = high - low if high > low else abs(rounded[0].item() - x) * 2
    error = quantum * (share * (1 - share) / rounded.numel()) ** 0.5
    return abs(rounded.mean().item() - x) / error


@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_many_roundings_is_the_value(case: str) -> None:
    rounding, value, quantum = CASES[case]
    x = torch.full((ROUNDINGS, 1), value)
    rounded = rounding(x, bits(ROUNDINGS, 1)).double()
    assert rounded.unique().numel() == 2
    assert (rounded - x).abs().max() <= quantum
    assert sigmas_off(rounded, x[0].double().item()) < SIGMAS


@pytest.mark.parametrize("case", CASES)
def test_rounding_to_nearest_fails_that(case: str) -> None:
    rounding, value, quantum = CASES[case]
    x = torch.full((ROUNDINGS, 1), value)
    rounded = rounding(x, None).double()
    assert (rounded - x).abs().max() <= quantum / 2
    assert sigmas_off(rounded, x[0].double().item()) > SIGMAS


@pytest.mark.parametrize("rounding", [to_fp16, to_bf16])
def test_what_a_format_has_is_kept(rounding: Rounding) -> None:
    kind = rounding(torch.zeros(1), None).dtype
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(kind)
    exact = every[every.isfinite()].float().unsqueeze(1)
    for given in (None, bits(len(exact), 1)):
        assert torch.equal(rounding(exact, given).float(), exact)


def test_whole_numbers_of_levels_are_kept() -> None:
    for tier, levels in LEVELS.items():
        q = torch.arange(-levels, levels + 1.0).unsqueeze(0)
        scale = torch.tensor([0.25])
        assert torch.equal(quantised(q * 0.25, scale, tier, bits(1, q.shape[1])), q)


def test_what_is_beyond_a_format_becomes_its_largest() -> None:
    big = torch.tensor([[7e4, -1e9, 65519.0, -65503.0]])
    for given in (None, bits(1, 4)):
        assert to_fp16(big, given).abs().max() == FP16_MAX
        assert to_fp16(big, given)[0, 1] == -FP16_MAX
    assert quantised(torch.tensor([[9.0, -9.0]]), torch.tensor([0.01]), Tier.INT8, None).tolist() == [[127.0, -127.0]]


def test_zero_stays_zero_in_every_format() -> None:
    zeros, scale = torch.zeros(3, 4), torch.zeros(3)
    assert not kept_scale(zeros, torch.ones(3), Tier.INT8).any()
    for rounded in (quantised(zeros, scale, Tier.INT4, bits(3, 4)), to_fp16(zeros, bits(3, 4)), to_bf16(zeros, None)):
        assert not rounded.float().any()


def test_a_scale_is_kept_while_the_largest_value_is_in_its_upper_half() -> None:
    x = torch.tensor([[0.5, 1.27], [0.1, 0.6], [0.1, -0.64], [1.0, 1.28]])
    scale = torch.full((4,), 0.01)
    assert torch.allclose(kept_scale(x, scale, Tier.INT8), torch.tensor([0.01, 0.6 / 127, 0.01, 1.28 / 127]))


def test_two_numbers_of_four_bits_fit_a_byte() -> None:
    q = torch.randint(-7, 8, (50, 6), generator=torch.Generator().manual_seed(0)).float()
    packed = pack_int4(q)
    assert packed.shape == (50, 3)
    assert torch.equal(unpack_int4(packed), q)
    assert pack_int4(torch.tensor([[1.0, -1.0]])).tolist() == [[0xF1]]


def test_units_lie_in_0_to_1() -> None:
    assert unit(torch.tensor([0, (1 << 32) - 1])).tolist() == [0.0, 1 - 2.0**-24]


def moved(levels: tuple[Tier, ...], steps: int = 1000) -> tuple[Tensor, float, float]:
    """What columns of a row have moved by after tiny updates, what they should have, and the step of its format."""
    dim, lr = 64, 1e-5
    table = TieredTable(
        "t", "t", 1, dim, seed=3, init_scale=0.0, scalar=False, vectors=0, levels=levels, entry=levels[0]
    )
    start = torch.full((1, dim), 0.1)
    start[0, 0] = 1.0  # sets the scale, and does not move
    backend = Reference()
    backend.write(table, torch.tensor([0]), start, torch.tensor([int(levels[0])]))
    gradient = torch.ones(1, dim)
    gradient[0, 0] = 0.0
    before = backend.read(table, torch.tensor([0]))
    found = backend.sort([table], Bags(torch.tensor([0]), torch.tensor([0, 1]), None, (0,), (1,), Pooling.SUM))
    rule = TableOptimizer(name="sgd").rule(lr, 1)
    for _ in range(steps):
        table.advance()
        backend.update([table], found, gradient, [rule])
    after = backend.read(table, torch.tensor([0]))
    return (before - after)[0, 1:], lr * steps, table.desc[0, 1].view(torch.float32).item()


def test_a_thousand_updates_of_a_thousandth_of_a_step_add_up() -> None:
    """Each column is a random walk of steps q with probability p = lr / q: sigma^2 = n q^2 p (1 - p)."""
    change, expected, quantum = moved((Tier.INT8,))
    share = 1e-5 / quantum
    assert share < 0.1
    error = quantum * (1000 * share * (1 - share)) ** 0.5
    assert abs(change.mean().item() - expected) < SIGMAS * error / len(change) ** 0.5
    assert (change - expected).abs().max() < 5 * error


def test_rounding_to_nearest_would_not_move_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    nearest = rounding.quantised
    monkeypatch.setattr(
        "thresher.embeddings.kernels.records.quantised", lambda x, scale, tier, _: nearest(x, scale, tier, None)
    )
    change, _, _ = moved((Tier.INT8,), steps=100)
    assert not change.any()
