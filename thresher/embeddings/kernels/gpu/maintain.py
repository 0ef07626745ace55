"""Rows to lower tiers."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from thresher.embeddings.kernels.gpu.generator import row_keys
from thresher.embeddings.kernels.gpu.kernel import jit, launch
from thresher.embeddings.kernels.gpu.layout import FIRST, SECOND, Layout, counts_of, layout_of, settle
from thresher.embeddings.kernels.gpu.records import (
    inside_of,
    places_of,
    read_state,
    read_weights,
    set_places,
    slot_in,
    tier_in,
    write_state,
    write_weights,
)
from thresher.embeddings.kernels.gpu.slots import Movers, assign, by_tier, release, tier_of
from thresher.embeddings.rows.generator import DEMOTED, FIRST_STATE, SECOND_STATE, WEIGHTS
from thresher.embeddings.rows.tiered import TieredTable

_WEIGHTS = tl.constexpr(DEMOTED + WEIGHTS)
_FIRST_STATE = tl.constexpr(DEMOTED + FIRST_STATE)
_SECOND_STATE = tl.constexpr(DEMOTED + SECOND_STATE)


def demote_rows(table: TieredTable, first: int, count: int, keep_from: Sequence[float], tile: int) -> int:
    """Lowers rows ``first`` .. ``first + count - 1`` as the contract says, and returns how many moved."""
    rows = torch.arange(first, min(first + count, table.rows), device=table.device)
    layout, counts = layout_of([table], tile), counts_of([table])
    old = table.desc[first : first + count, 0].clone()
    bounds = torch.tensor([0, rows.numel()], device=table.device)
    movers = Movers(layout.numbers, counts, torch.zeros_like(old), bounds, old)
    moves = assign(movers, _lowered(table, old, table.stat[first : first + count, 1], keep_from), tier_of(old))
    moved = moves.place != old
    _launch(layout, counts, rows, moved, moves.place, table.n_vectors)
    freed = release(movers, torch.where(moved, old, 0), moves.taken)
    number, *slots = torch.cat([moved.sum().view(1), moves.taken.view(-1), freed.view(-1)]).tolist()
    half = len(slots) // 2
    settle(table, by_tier(slots[:half], 1)[0], by_tier(slots[half:], 1)[0])
    return int(number)


def _lowered(table: TieredTable, old: Tensor, priority: Tensor, keep_from: Sequence[float]) -> Tensor:
    """[U] int32 tiers by priority, level after level from the highest down."""
    target = tier_of(old)
    for level, lower in reversed(list(zip(table.levels[1:], table.levels, strict=False))):
        threshold = torch.tensor(keep_from[level], dtype=torch.float32).item()
        target = torch.where((target == level) & (priority < threshold), int(lower), target)
    return target


def _launch(layout: Layout, counts: Tensor, rows: Tensor, moved: Tensor, places: Tensor, vectors: int) -> None:
    count, tile = rows.numel(), layout.rows
    launch(
        _relocate,
        -(-count // tile),
        *(layout.numbers, counts, rows, moved, places, count, vectors),
        *(layout.levels, layout.align, tile, layout.block),
    )


@jit
def _relocate(
    numbers: tl.tensor,
    counts: tl.tensor,
    row_numbers: tl.tensor,
    moved: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    vectors: tl.constexpr,
    levels: tl.constexpr,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A tile of rows of one table, of which those that are ``moved`` go to new places."""
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = (at < count) & (tl.load(moved + at, mask=at < count, other=0) != 0)
    table = tl.zeros_like(at)
    row = tl.load(row_numbers + at, mask=live, other=0)
    goes = tl.load(places + at, mask=live, other=0)
    inside = inside_of(numbers, table, live, align, block)
    tier, slot, scale = places_of(numbers, table, row, live)
    x = read_weights(numbers, table, row, tier, slot, scale, inside, levels, align, block)
    to_tier, to_slot = tl.where(live, tier_in(goes), 1), slot_in(goes)
    keys = row_keys(numbers, counts, table, row, live)
    fresh = tl.zeros_like(scale)
    if vectors > 0:
        first = read_state(numbers, table, tier, slot, inside, FIRST, levels, align, block)
        write_state(*(numbers, table, keys, to_tier, to_slot, first, inside, FIRST, _FIRST_STATE, levels, align, block))
    if vectors > 1:
        second = read_state(numbers, table, tier, slot, inside, SECOND, levels, align, block)
        write_state(
            *(numbers, table, keys, to_tier, to_slot, second, inside, SECOND, _SECOND_STATE, levels, align, block)
        )
    fresh = write_weights(*(numbers, table, keys, to_tier, to_slot, fresh, x, inside, _WEIGHTS, levels, align, block))
    set_places(numbers, table, row, goes, fresh, live)
