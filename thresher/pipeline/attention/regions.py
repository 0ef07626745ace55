"""Where keys and values of every slice lie in the pool of a chunk: pure arithmetic, fixed by the schedule.

A pool has two ends, so that two microbatches share it while one is drained and the next one fills it:

    rows      0 ->                                             <- capacity
              [k=0: slice 0 | slice 1 | slice 2 |   free   | slice 1 | slice 0 :k=1]

Tokens keep their order inside a slice on both sides. The prefix of a slice is therefore contiguous on either side (on
the right with its slices in reverse order, which unmasked attention does not notice), unless its sequence begins
inside a slice of the right side: then it is two pieces. More live microbatches get more such pairs of regions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from thresher.pipeline.layout import Layout
from thresher.pipeline.schedule.ops import Kind, Op, Schedule

_FREES = (Kind.BACKWARD, Kind.INPUT_BACKWARD)


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


def place(layout: Layout, first: int, last: int, origin: int, mirrored: bool) -> tuple[Rows, ...]:
    """Rows of tokens ``first`` .. ``last`` - 1 of a microbatch that grows from row ``origin`` to the right or left."""
    if not mirrored:
        return (Rows(origin + first, (range(first, last),)),)
    found: list[Rows] = []
    for index in reversed(range(layout.slices)):
        low, high = layout.bounds[index], layout.bounds[index + 1]
        tokens = range(max(first, low), min(last, high))
        if tokens:
            _append(found, Rows(origin - high + tokens.start - low, (tokens,)))
    return tuple(found)


def _append(found: list[Rows], rows: Rows) -> None:
    if found and found[-1].last == rows.first:
        found[-1] = Rows(found[-1].first, found[-1].tokens + rows.tokens)
    else:
        found.append(rows)


@dataclass(frozen=True)
class Regions:
    """The pool of one chunk.

    Attributes:
        layouts: of all microbatches of a step.
        capacities: tokens of each pair of regions; microbatch k has pair k mod R // 2, R = 2 * pairs, its left side
            where k is even and its right side where k is odd. Empty where there is one slice, so never a prefix.
    """

    layouts: tuple[Layout, ...]
    capacities: tuple[int, ...]

    @property
    def capacity(self) -> int:
        """Tokens of the pool, per row of the batch."""
        return sum(self.capacities)

    @property
    def batch(self) -> int:
        """Rows of the largest microbatch, B."""
        return max(layout.batch for layout in self.layouts)

    @cached_property
    def _edges(self) -> tuple[int, ...]:
        return (0, *accumulate(self.capacities))

    def pair(self, microbatch: int) -> int:
        """Which pair of regions a microbatch uses."""
        return microbatch % (2 * len(self.capacities)) // 2

    def is_mirrored(self, microbatch: int) -> bool:
        """Whether it grows from the right end of its pair leftwards."""
        return microbatch % 2 == 1

    def rows(self, microbatch: int, first: int, last: int) -> tuple[Rows, ...]:
        """Rows of tokens ``first`` .. ``last`` - 1 of a microbatch: one piece, or two (see above)."""
        mirrored, pair = self.is_mirrored(microbatch), self.pair(microbatch)
        return place(self.layouts[microbatch], first, last, self._edges[pair + mirrored], mirrored)

    def overlap(self, microbatch: int, live: dict[int, int]) -> str:
        """Why ``live`` (slices by microbatch) do not fit side by side in the pair of ``microbatch``; or nothing."""
        pair = self.pair(microbatch)
        used = {k: self.layouts[k].bounds[slices] for k, slices in live.items() if slices and self.pair(k) == pair}
        if len({k % 2 for k in used}) < len(used):
            return f"microbatches {sorted(used)} want the same region"
        if sum(used.values()) > self.capacities[pair]:
            return f"{used} tokens by microbatch exceed {self.capacities[pair]}"
        return ""


def plan_regions(schedule: Schedule, rank: int, layouts: Sequence[Layout]) -> tuple[Regions, ...]:
    """The pools of ``rank``, by chunk: as large as the most tokens that are live at once.

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
        return Regions(layouts, ())
    window = max(max(live) - min(live) + 1 for live in _walk(ops, layouts) if live)
    empty = Regions(layouts, (0,) * -(-window // 2))
    capacities = [0] * len(empty.capacities)
    for live in _walk(ops, layouts):
        for pair, capacity in enumerate(capacities):
            tokens = sum(tokens for k, tokens in live.items() if empty.pair(k) == pair)
            capacities[pair] = max(capacity, tokens)
    return Regions(layouts, tuple(capacities))


def _walk(ops: list[Op], layouts: tuple[Layout, ...]) -> Iterator[dict[int, int]]:
    """Live tokens by microbatch after each operation."""
    live: dict[int, int] = {}
    for op in ops:
        tokens = layouts[op.microbatch].bounds[op.slice + (op.kind is Kind.FORWARD)]
        live = {k: v for k, v in (live | {op.microbatch: tokens}).items() if v}
        yield live


def history(layout: Layout, index: int) -> range:
    """Tokens before slice ``index`` that its first segment looks back at."""
    low = layout.bounds[index]
    return range(min(layout.segments(index)[0].start, low), low)


def moved(layout: Layout, index: int, share: int) -> range:
    """The part of that history which an exchange of ``share`` slices moves: what is in the oldest ``share``."""
    tokens = history(layout, index)
    return range(tokens.start, max(tokens.start, min(tokens.stop, layout.bounds[share])))
