"""Blocks of tiered rows: bytes and back, cut and joined, without a number changing where none has to."""

import pytest
import torch

from tests.sharding.tier_tables import Rectangle, mixed, same, step, table
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import CheckpointError
from thresher.sharding.tier_blocks import (
    BLOCK_ROWS,
    block_ranges,
    decoded,
    encoded,
    encoded_size,
    put_block,
    rows_of,
    take_block,
)
from thresher.sharding.tier_columns import cut, joined

ROWS, DIM = 90, 16
OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam", "ftrl")
WHOLE = (0, ROWS, 0, DIM)


def trained(places: list[Rectangle], optimizer: TableOptimizer) -> list[TieredTable]:
    tables = [table(place, DIM, optimizer) for place in places]
    mixed(tables, optimizer)
    return tables


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_table_survives_its_bytes_and_goes_on_alike(name: str) -> None:
    optimizer = TableOptimizer(name=name)
    (before,) = trained([WHOLE], optimizer)
    found = set(before.tier_of().tolist())
    assert found >= {Tier.NONE, Tier.INT8, Tier.FP16, Tier.FP32}
    assert found & {Tier.INT4, Tier.DROPPED}
    data = encoded(take_block(before, 0, ROWS), 0)
    assert data.numel() == encoded_size(before, 0, ROWS)
    after = table(WHOLE, DIM, optimizer)
    put_block(after, decoded(data, 0))
    assert same(before, after)
    after.step, after.gain, after.decay = before.step, before.gain, before.decay
    after.promote_above, after.keep_from = before.promote_above, before.keep_from
    ids, grad = torch.arange(0, ROWS, 2), torch.randn(ROWS // 2, DIM)
    for part in (before, after):
        step([part], optimizer, ids, grad)
    assert same(before, after)


def test_rows_that_were_never_updated_leave_nothing() -> None:
    optimizer = TableOptimizer()
    fresh = table((0, 5 * BLOCK_ROWS, 0, DIM), DIM, optimizer)
    assert [encoded_size(fresh, *part) for part in block_ranges(0, fresh.rows)] == [0] * 5
    step([fresh], optimizer, torch.tensor([BLOCK_ROWS + 7]), torch.ones(1, DIM))
    sizes = [encoded_size(fresh, *part) for part in block_ranges(0, fresh.rows)]
    assert sizes[:1] + sizes[2:] == [0] * 4
    assert 0 < sizes[1] < 100


def test_blocks_start_at_fixed_rows() -> None:
    assert list(block_ranges(BLOCK_ROWS - 3, 2 * BLOCK_ROWS)) == [
        (BLOCK_ROWS - 3, 3),
        (BLOCK_ROWS, BLOCK_ROWS),
        (2 * BLOCK_ROWS, BLOCK_ROWS - 3),
    ]
    assert list(block_ranges(5, 10)) == [(5, 10)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_cut_exactly(name: str) -> None:
    optimizer = TableOptimizer(name=name)
    (whole,) = trained([WHOLE], optimizer)
    parts = trained([(0, 31, 0, DIM), (31, ROWS - 31, 0, DIM)], optimizer)
    block = take_block(whole, 0, ROWS)
    for part in parts:
        after = table((part.row0, part.rows, 0, DIM), DIM, optimizer)
        put_block(after, block.within(part.row0, part.row0 + part.rows))
        assert same(part, after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_columns_cut_and_join_exactly_where_scales_are_shared(name: str) -> None:
    (whole,) = trained([WHOLE], TableOptimizer(name=name))
    block = take_block(whole, 0, ROWS)
    left, right = cut(block, 0, 4), cut(block, 4, DIM)
    assert torch.equal(torch.cat([rows_of(left), rows_of(right)], 1), rows_of(block))
    again = joined([left, right])
    assert torch.equal(encoded(again, 0), encoded(block, 0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_with_scales_of_their_own_are_rounded_once(name: str) -> None:
    optimizer = TableOptimizer(name=name)
    parts = [take_block(part, 0, ROWS) for part in trained([(0, ROWS, 0, 8), (0, ROWS, 8, 8)], optimizer)]
    before = torch.cat([rows_of(part) for part in parts], 1)
    whole = joined(parts)
    assert torch.equal(whole.tier, parts[0].tier)
    quantised = (whole.tier == Tier.INT8) | (whole.tier == Tier.INT4)
    assert torch.equal(rows_of(whole)[~quantised], before[~quantised])
    largest = torch.stack([part.scale for part in parts]).amax(0)[quantised]
    error = (rows_of(whole) - before)[quantised].abs().amax(1)
    assert bool((error <= 0.5001 * largest).all())
    assert error.any()
    assert torch.equal(encoded(joined([cut(whole, 0, 8), cut(whole, 8, DIM)]), 0), encoded(whole, 0))


def test_a_row_gets_the_highest_tier_of_its_parts() -> None:
    optimizer = TableOptimizer(name="adam")
    left, right = trained([(0, ROWS, 0, 8), (0, ROWS, 8, 8)], optimizer)
    values = Reference().read(left, torch.arange(ROWS))
    upper = (left.tier_of() > Tier.DROPPED).nonzero()[:, 0]
    Reference().write(left, upper, values[upper], torch.full((len(upper),), int(Tier.FP32)))
    whole = joined([take_block(part, 0, ROWS) for part in (left, right)])
    assert set(whole.tier.tolist()) <= {Tier.DROPPED, Tier.FP32}
    both = torch.cat([Reference().read(part, whole.rows) for part in (left, right)], 1)
    stored = whole.tier == Tier.FP32
    assert torch.equal(rows_of(whole)[stored], both[stored])


def test_parts_of_different_rows_are_refused() -> None:
    left, right = trained([(0, ROWS, 0, 8), (0, ROWS, 8, 8)], TableOptimizer())
    blocks = [take_block(left, 0, ROWS), take_block(right, 0, ROWS).within(0, 20)]
    with pytest.raises(CheckpointError, match="column shards of a table hold different rows"):
        joined(blocks)
