"""The update of the distinct rows of a lookup, in phases, none of which depends on the order in which programs run.

    increases     what each row's priority grows by
    plan          new priorities, and the tier that each row wants
    assign        slots for rows that change their tier (``slots.py``)
    apply         gradient, decode, optimizer, encode at the new place, header
    release       slots that rows left go to the free stacks

All but the last wait for nothing on the host, which reads some counts at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from thresher.embeddings.kernels.backend import UpdateStats
from thresher.embeddings.kernels.gpu.generator import row_keys
from thresher.embeddings.kernels.gpu.gradients import Gradients, row_gradients, run_sums
from thresher.embeddings.kernels.gpu.kernel import TILE, jit, launch
from thresher.embeddings.kernels.gpu.layout import (
    DESC,
    ENTRY,
    FIRST,
    FULL_DIM,
    LEVELS,
    SECOND,
    STAT,
    STAT_BYTES,
    field,
)
from thresher.embeddings.kernels.gpu.records import (
    DROPPED,
    FP32,
    HAS_NONE,
    NONE,
    inside_of,
    place_for,
    places_of,
    read_state,
    read_weights,
    set_places,
    slot_in,
    tier_in,
    write_state,
    write_weights,
)
from thresher.embeddings.kernels.gpu.rules import (
    ABOVE,
    GAIN,
    NAME,
    OPTIMIZERS,
    ROWWISE_ADAGRAD,
    ROWWISE_ADAM,
    column_sums,
    constant,
    l2_gradient,
    step_of,
)
from thresher.embeddings.kernels.gpu.slots import Movers, Moves, assign, release, tier_of
from thresher.embeddings.kernels.rules import VECTORS, RowOptimizerName, UpdateRule
from thresher.embeddings.rows.generator import FIRST_STATE, SECOND_STATE, WEIGHTS
from thresher.embeddings.rows.tiers import Tier

_ALL_FINE = (1 << 63) - 1
_WEIGHTS = tl.constexpr(WEIGHTS)
_FIRST_STATE = tl.constexpr(FIRST_STATE)
_SECOND_STATE = tl.constexpr(SECOND_STATE)


@dataclass(frozen=True)
class Done:
    """What an update did, once the device is through.

    Attributes:
        bad: number of the first distinct row whose gradient is not finite, -1 if there is none.
        promoted, refused: as :class:`UpdateStats`.
        taken, freed: [4 x tables] slots by stored tier.
    """

    bad: int
    promoted: int
    refused: int
    taken: list[int]
    freed: list[int]


def update_rows(
    gradients: Gradients,
    rules: Sequence[UpdateRule],
    constants: Tensor,
    counts: Tensor,
    importance: Tensor | None,
    sums: Tensor | None,
) -> Done:
    """Updates the distinct rows; one rule (and one row of ``constants``) a table.

    A row whose gradient is not finite stays as it is. ``sums`` [U] are sums of squares over whole rows.
    """
    runs = gradients.runs
    priority = torch.empty(runs.row.numel(), device=runs.row.device)
    old, wanted, otherwise = _plan_rows(gradients, constants, importance, priority)
    movers = Movers(runs.layout.numbers, counts, runs.table, runs.bounds_at, old)
    moves = assign(movers, wanted, otherwise)
    bad = torch.full((1,), _ALL_FINE, dtype=torch.int64, device=runs.row.device)
    freed = torch.zeros_like(old)
    for name in sorted({rule.name for rule in rules}):
        _launch_apply(gradients, constants, movers, moves, (priority, freed, bad), sums, name)
    pushed = release(movers, freed, moves.taken)
    was = tier_of(old)
    promoted = ((tier_of(moves.place) > was) & (was != Tier.NONE)).sum()
    every = [bad, promoted.view(1), moves.refused.view(1), moves.taken.view(-1), pushed.view(-1)]
    found: list[int] = torch.cat(every).tolist()
    middle = 3 + moves.taken.numel()
    return Done(-1 if found[0] == _ALL_FINE else found[0], found[1], found[2], found[3:middle], found[middle:])


def stats_of(gradients: Gradients, done: Done) -> UpdateStats:
    """The same as the contract has it."""
    return UpdateStats(gradients.runs.row.numel(), done.promoted, done.refused)


def _plan_rows(
    gradients: Gradients, constants: Tensor, importance: Tensor | None, priority: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(old places, wanted tiers, tiers without promotion), each [U] int32; fills ``priority`` [U]."""
    runs = gradients.runs
    if importance is None:
        increases = (runs.starts[1:] - runs.starts[:-1]).to(torch.float32)
    else:
        increases = run_sums(runs, importance[runs.places.sample[runs.bag].long()])
    count = runs.row.numel()
    old, wanted, otherwise = torch.empty(3, count, dtype=torch.int32, device=runs.row.device)
    launch(
        _plan,
        -(-count // TILE),
        *(runs.layout.numbers, constants, runs.table, runs.row, increases),
        *(priority, old, wanted, otherwise, count, TILE),
    )
    return old, wanted, otherwise


def _launch_apply(
    gradients: Gradients,
    constants: Tensor,
    movers: Movers,
    moves: Moves,
    results: tuple[Tensor, Tensor, Tensor],
    sums: Tensor | None,
    name: RowOptimizerName,
) -> None:
    runs, layout = gradients.runs, gradients.runs.layout
    count, rows = runs.row.numel(), layout.rows
    launch(
        _apply,
        -(-count // rows),
        *(layout.numbers, movers.counts, constants, runs.table, runs.row, *gradients.arguments),
        *(movers.old, moves.place, *results, sums, count, OPTIMIZERS.index(name), VECTORS[name]),
        *(layout.levels, layout.align, rows, layout.block),
    )


@jit
def _plan(
    numbers: tl.tensor,
    rules: tl.tensor,
    tables: tl.tensor,
    row_numbers: tl.tensor,
    increases: tl.tensor,
    priorities: tl.tensor,
    old: tl.tensor,
    wanted: tl.tensor,
    otherwise: tl.tensor,
    count: tl.tensor,
    rows: tl.constexpr,
) -> None:
    """A row of numbers; rows of flat tables want to stay."""
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = at < count
    table = tl.load(tables + at, mask=live, other=0)
    row = tl.load(row_numbers + at, mask=live, other=0)
    tier, slot, _ = places_of(numbers, table, row, live)
    tiered = live & (field(numbers, table, DESC) != 0)
    stat = (field(numbers, table, STAT) + row * 8 + 4).to(tl.pointer_type(tl.float32))
    more = constant(rules, table, GAIN) * tl.load(increases + at, mask=live, other=0.0)
    priority = tl.load(stat, mask=tiered, other=0.0) + more
    base = tl.where(tier == NONE, field(numbers, table, ENTRY).to(tl.int32), tier)
    best = base
    levels = field(numbers, table, LEVELS).to(tl.int32)
    for level in tl.static_range(DROPPED, FP32 + 1):
        above = priority > constant(rules, table, ABOVE + level)
        best = tl.where(tiered & above & (base < level) & (((levels >> level) & 1) == 1), level, best)
    tl.store(priorities + at, priority, mask=live)
    tl.store(old + at, place_for(tier, tl.where(tiered, slot, 0)), mask=live)
    tl.store(wanted + at, best, mask=live)
    tl.store(otherwise + at, base, mask=live)


@jit
def finite_rows(g: tl.tensor, at: tl.tensor, live: tl.tensor, bad: tl.tensor) -> tl.tensor:
    """[R]: whether all of a row is finite; ``bad`` becomes the lowest number ``at`` of a live row that is not."""
    fine = tl.min((tl.abs(g) < float("inf")).to(tl.int32), axis=1) > 0
    tl.atomic_min(bad + tl.zeros_like(at), at.to(tl.int64), mask=live & (fine == 0))
    return fine


@jit
def _apply(
    numbers: tl.tensor,
    counts: tl.tensor,
    rules: tl.tensor,
    tables: tl.tensor,
    row_numbers: tl.tensor,
    starts: tl.tensor,
    grad: tl.tensor,
    source: tl.tensor,
    factor: tl.tensor,
    first_piece: tl.tensor,
    pieces: tl.tensor,
    piece: tl.tensor,
    old: tl.tensor,
    places: tl.tensor,
    priorities: tl.tensor,
    freed: tl.tensor,
    bad: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    name: tl.constexpr,
    vectors: tl.constexpr,
    levels: tl.constexpr,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A tile of rows, those whose tables have the optimizer ``name``."""
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = at < count
    table = tl.load(tables + at, mask=live, other=0)
    live = live & (constant(rules, table, NAME) == name)
    row = tl.load(row_numbers + at, mask=live, other=0)
    inside = inside_of(numbers, table, live, align, block)
    g = row_gradients(at, live, inside, starts, grad, source, factor, first_piece, pieces, piece, align, rows, block)
    fine = finite_rows(g, at, live, bad)
    was = tl.load(old + at, mask=live, other=0)
    goes = tl.load(places + at, mask=live, other=0)
    tl.store(freed + at, tl.where(was == goes, 0, tl.where(fine, was, goes)), mask=live)
    live = live & fine
    inside = inside & fine[:, None]

    tier, slot, scale = places_of(numbers, table, row, live)
    x = read_weights(numbers, table, row, tier, slot, scale, inside, levels, align, block)
    first = tl.zeros([rows, block], tl.float32)
    second = first
    if vectors > 0:
        first = read_state(numbers, table, tier, slot, inside, FIRST, levels, align, block)
    if vectors > 1:
        second = read_state(numbers, table, tier, slot, inside, SECOND, levels, align, block)
    header = field(numbers, table, STAT) + row * field(numbers, table, STAT_BYTES)
    stat = header.to(tl.pointer_type(tl.float32))
    kept = live & (field(numbers, table, STAT) != 0)
    scalar = tl.load(stat, mask=kept, other=0.0)

    g = tl.where(inside, l2_gradient(rules, table, x, g), 0.0)
    mean_square = scalar
    if (name == ROWWISE_ADAGRAD) | (name == ROWWISE_ADAM):
        total = column_sums(g * g, rows, block) if sums is None else tl.load(sums + at, mask=live, other=0.0)
        mean_square = tl.math.div_rn(total, field(numbers, table, FULL_DIM).to(tl.float32))
    x, scalar, first, second = step_of(rules, table, x, g, scalar, first, second, mean_square, name)
    x = tl.where(inside, x, 0.0)

    stays = was == goes
    flat = field(numbers, table, DESC) == 0
    tier = tl.where(live, tier_in(goes), DROPPED)
    slot = tl.where(flat, row, slot_in(goes))
    keys = tl.zeros_like(row).to(tl.uint64)
    if HAS_NONE & levels:
        keys = row_keys(numbers, counts, table, row, live)
    scale = write_weights(
        *(numbers, table, keys, tier, slot, tl.where(stays, scale, 0.0), x, inside, _WEIGHTS, levels, align, block)
    )
    if vectors > 0:
        write_state(*(numbers, table, keys, tier, slot, first, inside, FIRST, _FIRST_STATE, levels, align, block))
    if vectors > 1:
        write_state(*(numbers, table, keys, tier, slot, second, inside, SECOND, _SECOND_STATE, levels, align, block))
    set_places(numbers, table, row, goes, scale, live)
    tl.store(stat, scalar, mask=kept)
    tl.store(stat + 1, tl.load(priorities + at, mask=live, other=0.0), mask=kept & (flat == 0))
