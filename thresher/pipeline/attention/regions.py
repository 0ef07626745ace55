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
    """

    layouts: tuple[Layout, ...]
    capacity: int
    firsts: tuple[tuple[int, ...], ...]

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

    def overlap(self, microbatch: int, index: int, live: dict[int, int]) -> str:
        """Which of the ``live`` slices (counts by microbatch) has rows of slice ``index``; empty where none has."""
        first, last = self._span(microbatch, index)
        for other, slot in ((other, slot) for other, count in live.items() for slot in range(count)):
            begin, end = self._span(other, slot)
            if (other, slot) != (microbatch, index) and begin < last and first < end:
                return f"slice {slot} of microbatch {other}"
        return ""

    def _span(self, microbatch: int, index: int) -> tuple[int, int]:
        first = self.firsts[microbatch][index]
        return first, first + self.layouts[microbatch].length(index)


def _joined(pieces: list[Rows]) -> tuple[Rows, ...]:
    found: list[Rows] = []
    for piece in pieces:
        if found and found[-1].last == piece.first:
            found[-1] = Rows(found[-1].first, found[-1].tokens + piece.tokens)
        else:
            found.append(piece)
    return tuple(found)


def plan_regions(schedule: Schedule, rank: int, layouts: Sequence[Layout]) -> tuple[Regions, ...]:
    """The pools of ``rank``, by chunk.

    A slice is live from its FORWARD to its BACKWARD or INPUT_BACKWARD.

    Args:
        schedule: what the rank will execute.
        rank: of the pipeline.
        layouts: by microbatch.
    """
    ops = schedule.of(rank, Kind.FORWARD, *_FREES)
    chunks = range(schedule.shape.chunks)
    return tuple(_plan([op for op in ops if op.chunk == chunk], tuple(layouts)) for chunk in chunks)


def _plan(ops: list[Op], layouts: tuple[Layout, ...]) -> Regions:
    if layouts[0].slices == 1:
        return Regions(layouts, 0, ((0,),) * len(layouts))
    least, apart = _least(ops, layouts), _apart(ops, layouts)
    for capacity in range(least, apart.capacity, max(1, least // _TRIALS)):
        firsts = _Packing(layouts, capacity).pack(ops)
        if firsts:
            return Regions(layouts, capacity, firsts)
    return apart


def _least(ops: list[Op], layouts: tuple[Layout, ...]) -> int:
    """The most tokens that are live at once."""
    return max(sum(live.values()) for live in _walk(ops, layouts))


def _apart(ops: list[Op], layouts: tuple[Layout, ...]) -> Regions:
    """Room for as many whole microbatches as are ever live at once: wasteful, and always possible."""
    window = max(max(live) - min(live) + 1 for live in _walk(ops, layouts) if live)
    longest = max(layout.tokens for layout in layouts)
    firsts = (tuple(k % window * longest + bound for bound in lay.bounds[:-1]) for k, lay in enumerate(layouts))
    return Regions(layouts, window * longest, tuple(firsts))


def _walk(ops: list[Op], layouts: tuple[Layout, ...]) -> Iterator[dict[int, int]]:
    """Live tokens by microbatch after each operation."""
    live: dict[int, int] = {}
    for op in ops:
        tokens = layouts[op.microbatch].bounds[op.slice + (op.kind is Kind.FORWARD)]
        live = {k: v for k, v in (live | {op.microbatch: tokens}).items() if v}
        yield live


class _Packing:
    """One trial: blocks (first row, one past the last) of live microbatches in ``capacity`` rows."""

    def __init__(self, layouts: tuple[Layout, ...], capacity: int) -> None:
        self.layouts, self.capacity = layouts, capacity
        self.blocks: dict[int, tuple[int, int]] = {}
        self.firsts: list[list[int]] = [[0] * layout.slices for layout in layouts]

    def pack(self, ops: list[Op]) -> tuple[tuple[int, ...], ...] | None:
        """First rows by microbatch and slice; None where some slice finds no room next to its block."""
        for op in ops:
            length = self.layouts[op.microbatch].length(op.slice)
            if op.kind is not Kind.FORWARD:
                self._free(op.microbatch, op.slice, length)
            elif not self._put(op.microbatch, op.slice, length):
                return None
        return tuple(map(tuple, self.firsts))

    def _free(self, microbatch: int, index: int, length: int) -> None:
        low, high = self.blocks.pop(microbatch)
        if index:
            on_left = self.firsts[microbatch][index] == low
            self.blocks[microbatch] = (low + length, high) if on_left else (low, high - length)

    def _put(self, microbatch: int, index: int, length: int) -> bool:
        spot = self._grow(microbatch, length) if index else self._start(length)
        if spot is None:
            return False
        low, high = self.blocks.get(microbatch, (spot, spot))
        self.blocks[microbatch] = (min(low, spot), max(high, spot + length))
        self.firsts[microbatch][index] = spot
        return True

    def _gaps(self, length: int) -> list[tuple[int, int]]:
        """Free room of at least ``length`` rows, the smallest first."""
        edges = [(0, 0), *sorted(self.blocks.values()), (self.capacity, self.capacity)]
        gaps = ((left[1], right[0]) for left, right in pairwise(edges) if right[0] - left[1] >= length)
        return sorted(gaps, key=lambda gap: gap[1] - gap[0])

    def _grow(self, microbatch: int, length: int) -> int | None:
        """Into the smaller room beside the block: the larger one may yet be wanted by others."""
        low, high = self.blocks[microbatch]
        for begin, end in self._gaps(length):
            if end == low:
                return low - length
            if begin == high:
                return high
        return None

    def _start(self, length: int) -> int | None:
        """In the smallest room, away from the older of its neighbours, which goes first and so widens it."""
        for begin, end in self._gaps(length):
            oldest = min((k for k, (low, high) in self.blocks.items() if begin == high or end == low), default=None)
            if oldest is None or self.blocks[oldest][0] == end:
                return begin
            return end - length
        return None


def history(layout: Layout, index: int) -> range:
    """Tokens before slice ``index`` that its first segment looks back at."""
    low = layout.bounds[index]
    return range(min(layout.segments(index)[0].start, low), low)


def moved(layout: Layout, index: int, share: int) -> range:
    """The part of that history which an exchange of ``share`` slices moves: what is in the oldest ``share``."""
    tokens = history(layout, index)
    return range(tokens.start, max(tokens.start, min(tokens.stop, layout.bounds[share])))
