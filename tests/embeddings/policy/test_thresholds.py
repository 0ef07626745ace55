"""The choice of thresholds: fits the budget, wastes little of it, and treats equal priorities equally."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.embeddings.policy.small import BACKEND, info, planned, table
from thresher.embeddings.kernels.backend import HISTOGRAM_BUCKETS
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.thresholds import ROUNDING, TableRows, Thresholds, bucket_edge, solve
from thresher.embeddings.rows.tiers import Tier, record_bytes

LEVELS = (Tier.INT8, Tier.FP16, Tier.FP32)
LADDER = (Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)


def bucket_of(priority: Tensor) -> Tensor:
    """Written from the contract's words, by arithmetic on values rather than bits."""
    mantissa, exponent = torch.frexp(priority.double())  # priority = mantissa x 2^exponent, mantissa in [0.5, 1)
    bucket = (exponent.to(torch.int64) - 1 + 40) * 8 + ((mantissa * 2 - 1) * 8).floor().to(torch.int64)
    return torch.where(priority < 2.0**-40, 0, bucket).clamp(0, HISTOGRAM_BUCKETS - 1)


def histogram(priority: Tensor) -> Tensor:
    return torch.bincount(bucket_of(priority), minlength=HISTOGRAM_BUCKETS)


def rows(priority: Tensor, levels: tuple[Tier, ...] = LEVELS, dim: int = 64, factor: float = 1.0) -> TableRows:
    return TableRows(histogram(priority), levels, tuple(record_bytes(tier, dim) for tier in levels), factor)


def pareto(seed: int, count: int) -> Tensor:
    """Priorities with a heavy tail."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-6).pow(-1.0) * 1e-3


def worst_bytes(found: Thresholds, priority: Tensor, levels: tuple[Tier, ...], dim: int = 64) -> int:
    """If each row is in the highest tier that it may keep."""
    tier = torch.full(priority.shape, int(levels[0]))
    for level in levels[1:]:
        tier[priority >= found.keep_from[level]] = int(level)
    return sum(int((tier == level).sum()) * record_bytes(level, dim) for level in levels)


def test_edges_are_where_the_histogram_cuts() -> None:
    edges = torch.tensor([bucket_edge(bucket) for bucket in range(1, HISTOGRAM_BUCKETS)], dtype=torch.float32)
    below = torch.nextafter(edges, torch.zeros(()))
    shard = table(planned(TierConfig(budget="100%", flat_below_bytes=0), info("t", len(edges), 16)).tables[0])
    shard.desc[:, 0] = int(Tier.INT8) << 29
    for values, shift in ((edges, 0), (below, -1)):
        shard.stat[:, 1] = values
        wanted = torch.arange(1, HISTOGRAM_BUCKETS) + shift
        assert torch.equal(BACKEND.histogram(shard), torch.bincount(wanted, minlength=HISTOGRAM_BUCKETS))
        assert torch.equal(bucket_of(values), wanted)
    assert (bucket_edge(0), bucket_edge(HISTOGRAM_BUCKETS)) == (0.0, math.inf)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    share=st.floats(0.0, 1.1),
    spread=st.floats(1.01, 100.0),
    levels=st.sets(st.sampled_from(LADDER), min_size=1).filter(lambda chosen: chosen != {Tier.DROPPED}),
    factors=st.lists(st.floats(0.01, 100.0), min_size=4, max_size=4),
)
def test_any_rows_fit_the_room_and_a_higher_tier_has_a_higher_threshold(
    seed: int, sizes: list[int], share: float, spread: float, levels: set[Tier], factors: list[float]
) -> None:
    chosen = tuple(sorted(levels))
    tables = [pareto(seed + n, size) for n, size in enumerate(sizes)]
    given_rows = [rows(p, chosen, factor=f) for p, f in zip(tables, factors, strict=False)]
    least, most = (sum(sizes) * record_bytes(tier, 64) for tier in (chosen[0], chosen[-1]))
    room = int(least + share * (most - least))
    found = solve(given_rows, room, spread, 0.2)
    assert sum(worst_bytes(f, p, chosen) for f, p in zip(found, tables, strict=True)) <= room
    for each in found:
        kept = [each.keep_from[tier] for tier in chosen]
        assert kept == sorted(kept)
        assert all(
            each.promote_above[tier] >= 1.4999 * each.keep_from[tier] and each.keep_from[chosen[0]] == 0
            for tier in chosen[1:]
        )
        assert all(each.promote_above[tier] == math.inf for tier in Tier if tier not in chosen[1:])


@pytest.mark.parametrize("share", [0.33, 0.4, 0.6, 0.9])
def test_the_room_is_used_but_for_less_than_a_bucket(share: float) -> None:
    priority = pareto(1, 200_000)
    room = int(share * 200_000 * 256)
    (found,) = solve([rows(priority)], room, 8.0, 0.2)
    used = worst_bytes(found, priority, LEVELS)
    # One bucket holds about a tenth of the rows above it.
    assert 0.94 * room < used <= room


def test_everything_is_kept_where_everything_fits_and_nothing_where_nothing_does() -> None:
    priority = pareto(2, 1000)
    (all_kept,) = solve([rows(priority)], 1000 * 256, 8.0, 0.2)
    assert all_kept.keep_from == (0.0,) * 6
    assert all_kept.promote_above[Tier.FP16 :] == (0.0, 0.0)
    (none,) = solve([rows(priority)], 1000 * 64 - 1, 8.0, 0.2)
    assert none.keep_from[Tier.FP16 :] == (math.inf, math.inf)


def test_one_more_byte_is_needed_for_the_last_row() -> None:
    priority = torch.tensor([1.0, 2.0, 4.0, 64.0])
    for room, kept in ((4 * 64, 0), (4 * 64 + 63, 0), (4 * 64 + 64, 1), (4 * 64 + 192, 1)):
        (found,) = solve([rows(priority)], room, 8.0, 0.2)
        assert int((priority >= found.keep_from[Tier.FP16]).sum()) == kept


def test_a_level_means_the_same_priority_in_every_table() -> None:
    priority = pareto(3, 50_000)
    short = (Tier.INT8, Tier.FP32)
    room = int(0.4 * 2 * 50_000 * 256)
    full, skipping = solve([rows(priority), rows(priority, short)], room, 8.0, 0.2)
    # A bucket apart at most: the rest of the room goes to single tables.
    assert skipping.keep_from[Tier.FP32] == pytest.approx(full.keep_from[Tier.FP32], rel=0.13)
    assert full.keep_from[Tier.FP32] == pytest.approx(8.0 * full.keep_from[Tier.FP16], rel=0.26)


def test_a_factor_raises_the_priorities_of_its_table() -> None:
    priority = pareto(4, 50_000)
    room = int(0.4 * 2 * 50_000 * 256)
    plain, important = solve([rows(priority), rows(priority, factor=16.0)], room, 8.0, 0.2)
    assert plain.keep_from[Tier.FP16] == pytest.approx(16.0 * important.keep_from[Tier.FP16], rel=0.26)


def test_hysteresis_opens_the_gap_that_the_settings_tell() -> None:
    (found,) = solve([rows(pareto(5, 1000))], 1000 * 100, 8.0, 0.5)
    assert found.promote_above[Tier.FP16] == pytest.approx(3.0 * found.keep_from[Tier.FP16])


def test_rounding_lets_no_row_pass_that_was_counted_below() -> None:
    """Stats around edge x gain, where the quotient by the gain, in fp32, may be below the edge."""
    edge, met = bucket_edge(300), 0
    for power in range(-20, 61, 7):
        for part in range(1, 100):
            gain = 2.0**power * (1 + part / 97.3)
            stats = torch.tensor(edge * gain, dtype=torch.float32) * (1 + torch.arange(-3, 4) * 2.0**-23)
            below = bucket_of(stats / torch.tensor(gain, dtype=torch.float32)) < 300
            met += int((below & (stats >= torch.tensor(edge * gain, dtype=torch.float32))).sum())
            assert bool((stats[below] < torch.tensor(edge * ROUNDING * gain, dtype=torch.float32)).all())
    assert met > 0  # without the margin these would pass
