"""Slots for rows that change their tier: who gets which, on the device, in ascending order of (table, row)."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from thresher.embeddings.kernels.gpu.kernel import TILE, jit, launch
from thresher.embeddings.kernels.gpu.layout import ROOM, SPARE, STACK, TOPS, count, field
from thresher.embeddings.kernels.gpu.records import INT4, place_for, slot_in, tier_in
from thresher.embeddings.rows.tiered import SLOT_BITS
from thresher.embeddings.rows.tiers import STORED, Tier

_FIRST_STORED = int(STORED[0])


@dataclass(frozen=True)
class Movers:
    """Rows of some tables that may change their tier.

    Attributes:
        numbers, counts: of the tables (``layout.py``).
        table: [U] int32, ascending.
        bounds: [tables + 1] int64, where the rows of each table start.
        old: [U] int32 places.
    """

    numbers: Tensor
    counts: Tensor
    table: Tensor
    bounds: Tensor
    old: Tensor


@dataclass(frozen=True)
class Moves:
    """What :func:`assign` decided.

    Attributes:
        place: [U] int32, where each row goes.
        taken: [4, tables] int64 slots, by stored tier.
        refused: int64 number, rows whose tier has no slot left.
    """

    place: Tensor
    taken: Tensor
    refused: Tensor


def assign(movers: Movers, wanted: Tensor, otherwise: Tensor) -> Moves:
    """Slots in the tiers ``wanted`` [U] int32 for rows that are not there yet; free ones first, then fresh ones.

    Where a tier has too few, its last rows go to ``otherwise`` [U] int32 instead, which must have slots for them.
    """
    was = tier_of(movers.old)
    rank, _ = _ranks(movers, wanted, wanted != was)
    room = movers.counts[:, ROOM.value :][movers.table.long(), wanted.long()]
    late = (wanted != was) & (wanted >= _FIRST_STORED) & (rank >= room)
    target = torch.where(late, otherwise, wanted)
    rank, taken = _ranks(movers, target, target != was)
    place = torch.empty_like(movers.old)
    number = place.numel()
    arguments = (movers.numbers, movers.counts, movers.table, movers.old, target, rank, place)
    launch(_choose, -(-number // TILE), *arguments, number, TILE)
    return Moves(place, taken, late.sum())


def release(movers: Movers, freed: Tensor, taken: Tensor) -> Tensor:
    """Puts the slots of ``freed`` [U] int32 places (``NONE`` where there is none) on the free stacks.

    Returns:
        [4, tables] int64: how many, by stored tier.
    """
    tier = tier_of(freed)
    rank, number = _ranks(movers, tier, tier >= _FIRST_STORED)
    count = freed.numel()
    arguments = (movers.numbers, movers.counts, movers.table, freed, rank, taken)
    launch(_push, -(-count // TILE), *arguments, taken.shape[1], count, TILE)
    return number


def tier_of(place: Tensor) -> Tensor:
    """int32 tiers of int32 places."""
    return (place >> SLOT_BITS) & 7


def by_tier(numbers: list[int], tables: int) -> list[list[int]]:
    """Numbers [4 x tables] as kernels give them, as a list by number of the tier for each table."""
    rows = [numbers[start : start + tables] for start in range(0, len(numbers), tables)]
    return [[0] * _FIRST_STORED + [row[table] for row in rows] for table in range(tables)]


def _ranks(movers: Movers, tier: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """For each row its number among the rows of its table that go to its tier, and [4, tables] how many those are."""
    stored = torch.arange(_FIRST_STORED, len(Tier), device=tier.device, dtype=torch.int32)
    hot = (tier.unsqueeze(0) == stored.unsqueeze(1)) & going
    before = torch.zeros(len(stored), tier.numel() + 1, dtype=torch.int32, device=tier.device)
    torch.cumsum(hot, 1, dtype=torch.int32, out=before[:, 1:])
    at_bounds = before[:, movers.bounds]
    line = (tier - _FIRST_STORED).clamp(min=0).long()
    rows = torch.arange(tier.numel(), device=tier.device)
    rank = before[line, rows] - at_bounds[line, movers.table.long()]
    return rank, (at_bounds[:, 1:] - at_bounds[:, :-1]).long()


@jit
def _choose(
    numbers: tl.tensor,
    counts: tl.tensor,
    tables: tl.tensor,
    old: tl.tensor,
    targets: tl.tensor,
    ranks: tl.tensor,
    places: tl.tensor,
    number: tl.tensor,
    rows: tl.constexpr,
) -> None:
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = at < number
    table = tl.load(tables + at, mask=live, other=0)
    was = tl.load(old + at, mask=live, other=0)
    tier = tl.load(targets + at, mask=live, other=0)
    rank = tl.load(ranks + at, mask=live, other=0).to(tl.int64)
    stored = live & (tier >= INT4)
    spare = count(counts, table, SPARE + tier)
    stack = field(numbers, table, STACK + tier) + (spare - 1 - rank) * 4
    reused = tl.load(stack.to(tl.pointer_type(tl.int32)), mask=stored & (rank < spare), other=0).to(tl.int64)
    fresh = count(counts, table, TOPS + tier) + rank - spare
    slot = tl.where(stored, tl.where(rank < spare, reused, fresh), 0)
    place = tl.where(tier == tier_in(was), was, place_for(tier, slot))
    tl.store(places + at, place, mask=live)


@jit
def _push(
    numbers: tl.tensor,
    counts: tl.tensor,
    tables: tl.tensor,
    freed: tl.tensor,
    ranks: tl.tensor,
    taken: tl.tensor,
    width: tl.tensor,
    number: tl.tensor,
    rows: tl.constexpr,
) -> None:
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = at < number
    table = tl.load(tables + at, mask=live, other=0)
    place = tl.load(freed + at, mask=live, other=0)
    tier = tier_in(place)
    live = live & (tier >= INT4)
    spare = count(counts, table, SPARE + tier)
    used = tl.load(taken + (tier - INT4) * width + table, mask=live, other=0)
    top = spare - tl.minimum(used, spare) + tl.load(ranks + at, mask=live, other=0)
    stack = field(numbers, table, STACK + tier) + top * 4
    tl.store(stack.to(tl.pointer_type(tl.int32)), slot_in(place).to(tl.int32), mask=live)
