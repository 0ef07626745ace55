"""Where keys and values of every slice lie in the pool of a chunk: pure arithmetic, fixed by the schedule.

The live slices of a microbatch lie side by side, a *block*: each new one is put next to the older ones, on either side,
so the prefix of a slice is contiguous. (Unmasked attention does not notice in which order slices lie; tokens keep
their order inside a slice.) A new microbatch starts in the room that an older one gives back, at the far end from it,
and later grows into the room of the next one. With slices 0 .. 3 of microbatches a, b, c and two slices of slack:

    rows ->    a0 a1 a2 a3 b1 b0        c1 c0 b3 b2 b1 b0        c1 c0 c2 c3 b1 b0
               six live                 a is gone                b gives room to c

The room is planned by trying the schedule out, from as many tokens as are ever live at once upwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from thresher.pipeline.layout import Layout
from thresher.pipeline.schedule.ops import Kind, Op, Schedule

_FREES = (Kind.BACKWARD, Kind.INPUT_BACKWARD)
_TRIALS = 64

Block = tuple[int, int]
"""Microbatch and chunk."""


@dataclass(frozen=True)
class Rows:
    """Contiguous rows of a pool.

    Attributes:
        first: the first row.
        tokens: tokens of the microbatch in these rows, in order of rows.
    """

    first: int
    tokens: tuple[range, ...]

    @property
    def last(self) -> int:
        """One past the last row."""
        return self.first + sum(map(len, self.tokens))


@dataclass(frozen=True)
class Regions:
    """The pool of one chunk.

    Attributes:
        layouts: of all microbatches of a step.
        capacity: tokens of the pool, per row of the batch; 0 where there is one slice, so never a prefix.
        firsts: by microbatch and slice, its first row.
        pool: number of the pool among those of the rank; two chunks may share one.
    """

    layouts: tuple[Layout, ...]
    capacity: int
    firsts: tuple[tuple[int, ...], ...]
    pool: int

    @property
    def batch(self) -> int:
        """Rows of the largest microbatch, B."""
        return max(layout.batch for layout in self.layouts)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """By microbatch, the first row of slices 0 .. n - 2, those that later slices look back at."""
        return tuple(min(firsts[:-1], default=0) for firsts in self.firsts)

    def rows(self, microbatch: int, tokens: range) -> tuple[Rows, ...]:
        """Rows of consecutive ``tokens`` of a microbatch, in as few pieces as they lie in, in order of rows.

        All tokens before a slice are one piece. Those since the beginning of a sequence may be up to three.
        """
        bounds = self.layouts[microbatch].bounds
        pieces = []
        for first, (low, high) in zip(self.firsts[microbatch], pairwise(bounds), strict=True):
            part = range(max(tokens.start, low), min(tokens.stop, high))
            if part:
                pieces.append(Rows(first + part.start - low, (part,)))
        return _joined(sorted(pieces, key=lambda piece: piece.first))


def _joined(pieces: list[Rows]) -> tuple[Rows, ...]:
    found: list[Rows] = []
    for piece in pieces:
        if found and found[-1].last == piece.first:
            found[-1] = Rows(found[-1].first, found[-1].tokens + piece.tokens)
        else:
            found.append(piece)
    return tuple(found)


def plan_regions(
    schedule: Schedule, rank: int, layouts: Sequence[Layout], layers: Sequence[int] = ()
) -> tuple[Regions, ...]:
    """The pools of ``rank``, by chunk.

    A slice is live from its FORWARD to its BACKWARD or INPUT_BACKWARD. Chunks j and v - 1 - j share a pool where that
    is smaller: a microbatch leaves its last chunk first, when the next one enters its first chunk.

    Args:
        schedule: what the rank will execute.
        rank: of the pipeline.
        layouts: by microbatch.
        layers: by chunk, how many it has; chunks share only where these are known and equal.
    """
    chunks, by_microbatch = schedule.shape.chunks, tuple(layouts)
    by_chunk = [[op for op in schedule.of(rank, Kind.FORWARD, *_FREES) if op.chunk == chunk] for chunk in range(chunks)]
    alone = [_plan_alone(ops, by_microbatch, pool) for pool, ops in enumerate(by_chunk)]
    for chunk in range(chunks // 2 if layers else 0):
        other = chunks - 1 - chunk
        if layers[chunk] == layers[other]:
            both = [op for op in schedule.of(rank, Kind.FORWARD, *_FREES) if op.chunk in (chunk, other)]
            shared = _plan_together(both, by_microbatch, alone[chunk].capacity + alone[other].capacity)
            for which, (capacity, firsts) in shared.items():
                alone[which] = Regions(by_microbatch, capacity, firsts, chunk)
    return tuple(alone)


def _plan_alone(ops: list[Op], layouts: tuple[Layout, ...], pool: int) -> Regions:
    if layouts[0].slices == 1:
        return Regions(layouts, 0, ((0,),) * len(layouts), pool)
    apart = _apart(ops, layouts, pool)
    found = _plan_together(ops, layouts, apart.capacity)
    return Regions(layouts, *found[ops[0].chunk], pool) if found else apart


def _plan_together(
    ops: list[Op], layouts: tuple[Layout, ...], limit: int
) -> dict[int, tuple[int, tuple[tuple[int, ...], ...]]]:
    """By chunk, capacity and first rows in the smallest pool found below ``limit``; nothing where none is."""
    least = max(sum(live.values()) for live in _walk(ops, layouts))
    for capacity in range(least, limit, max(1, least // _TRIALS)):
        packing = _Packing(layouts, capacity)
        if packing.pack(ops):
            return {chunk: (capacity, packing.firsts(chunk)) for chunk in {op.chunk for op in ops}}
    return {}


def _apart(ops: list[Op], layouts: tuple[Layout, ...], pool: int) -> Regions:
    """Room for as many whole microbatches as are ever live at once: wasteful, and always possible."""
    numbers = [[microbatch for microbatch, _ in live] for live in _walk(ops, layouts) if live]
    window = max(max(live) - min(live) + 1 for live in numbers)
    longest = max(layout.tokens for layout in layouts)
    firsts = (tuple(k % window * longest + bound for bound in lay.bounds[:-1]) for k, lay in enumerate(layouts))
    return Regions(layouts, window * longest, tuple(firsts), pool)


def _walk(ops: list[Op], layouts: tuple[Layout, ...]) -> Iterator[dict[Block, int]]:
    """Live tokens by block after each operation."""
    live: dict[Block, int] = {}
    for op in ops:
        tokens = layouts[op.microbatch].bounds[op.slice + (op.kind is Kind.FORWARD)]
        live = {k: v for k, v in (live | {(op.microbatch, op.chunk): tokens}).items() if v}
        yield live


class _Packing:
    """One trial: where live blocks lie (first row, one past the last) in ``capacity`` rows."""

    def __init__(self, layouts: tuple[Layout, ...], capacity: int) -> None:
        self.layouts, self.capacity = layouts, capacity
        self.blocks: dict[Block, tuple[int, int]] = {}
        self.spots: dict[tuple[Block, int], int] = {}

    def firsts(self, chunk: int) -> tuple[tuple[int, ...], ...]:
        """First rows of a chunk by microbatch and slice."""
        return tuple(
            tuple(self.spots[(number, chunk), index] for index in range(layout.slices))
            for number, layout in enumerate(self.layouts)
        )

    def pack(self, ops: list[Op]) -> bool:
        """Whether every slice found room next to its block."""
        return all(self._step((op.microbatch, op.chunk), op) for op in ops)

    def _step(self, block: Block, op: Op) -> bool:
        length = self.layouts[op.microbatch].length(op.slice)
        if op.kind is not Kind.FORWARD:
            self._free(block, op.slice, length)
            return True
        spot = self._grow(block, length) if op.slice else self._start(length)
        if spot is None:
            return False
        low, high = self.blocks.get(block, (spot, spot))
        self.blocks[block] = (min(low, spot), max(high, spot + length))
        self.spots[block, op.slice] = spot
        return True

    def _free(self, block: Block, index: int, length: int) -> None:
        low, high = self.blocks.pop(block)
        if index:
            self.blocks[block] = (low + length, high) if self.spots[block, index] == low else (low, high - length)

    def _gaps(self, length: int) -> list[tuple[int, int]]:
        """Free room of at least ``length`` rows, the smallest first."""
        edges = [(0, 0), *sorted(self.blocks.values()), (self.capacity, self.capacity)]
        gaps = ((left[1], right[0]) for left, right in pairwise(edges) if right[0] - left[1] >= length)
        return sorted(gaps, key=lambda gap: gap[1] - gap[0])

    def _grow(self, block: Block, length: int) -> int | None:
        """Into the smaller room beside the block: the larger one may yet be wanted by others."""
        low, high = self.blocks[block]
        for begin, end in self._gaps(length):
            if end == low:
                return low - length
            if begin == high:
                return high
        return None

    def _start(self, length: int) -> int | None:
        """In the smallest room, away from the older of its neighbours, which goes first and so widens it."""
        for begin, end in self._gaps(length):
            beside = [
                (k, -chunk, low) for (k, chunk), (low, high) in self.blocks.items() if begin == high or end == low
            ]
            return begin if not beside or min(beside)[2] == end else end - length
        return None


def history(layout: Layout, index: int) -> range:
    """Tokens before slice ``index`` that its first segment looks back at."""
    low = layout.bounds[index]
    return range(min(layout.segments(index)[0].start, low), low)


def moved(layout: Layout, index: int, share: int) -> range:
    """The part of that history which an exchange of ``share`` slices moves: what is in the oldest ``share``."""
    tokens = history(layout, index)
    return range(tokens.start, max(tokens.start, min(tokens.stop, layout.bounds[share])))
