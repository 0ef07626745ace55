"""How much work operations are: the one cost model that placing operations and sharing attention go by.

Whether a schedule works never depends on what operations really cost; only how well it fits does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.ops import Kind, Op

TICKS = 1000
"""Ticks of a clock that a unit of work takes: whole numbers, so that equal work ends at the same tick."""


@dataclass(frozen=True)
class Work:
    """What the work of a step consists of.

    In units of what one slice of average length takes forward through a chunk, all but its attention. Backward is taken
    to cost twice as much in every respect.

    Attributes:
        attention: of a whole microbatch over everything else, forward; 0 for none.
        tokens: length of each slice, in any unit; empty where all are equal.
        head: one rank's part of a split output layer, for a slice of average length; its weights cost as much again.
    """

    attention: float = 0.0
    tokens: tuple[float, ...] = ()
    head: float = 0.25

    def __post_init__(self) -> None:
        for name in ("attention", "head"):
            if getattr(self, name) < 0:
                raise ScheduleError(f"{name} is {getattr(self, name)}", where="work", fix="give 0 or more")
        if any(length <= 0 for length in self.tokens):
            what = f"a slice of length {min(self.tokens)}"
            raise ScheduleError(what, where="work.tokens", fix="give lengths above 0")


class Prices:
    """What each operation costs, by its kind and slice.

    Raises:
        ScheduleError: lengths for another number of slices.
    """

    def __init__(self, slices: int, work: Work) -> None:
        if work.tokens and len(work.tokens) != slices:
            what = f"{len(work.tokens)} lengths for {slices} slices"
            raise ScheduleError(what, where="work.tokens", fix="give one length per slice, or none")
        total = sum(work.tokens)
        self._lengths = [length * slices / total for length in work.tokens] if work.tokens else [1.0] * slices
        self.before = list(accumulate(self._lengths, initial=0.0))
        """By slice, the length of all slices before it; one more entry for all."""
        self._pair = 2 * work.attention / slices
        self._linear = {**_LINEAR, Kind.HEAD: work.head, Kind.HEAD_WEIGHT: work.head}

    def alone(self, op: Op) -> float:
        """Cost of ``op`` where it is not shared."""
        length = self._lengths[op.slice]
        seen = self.before[op.slice] + length / 2
        return self._linear[op.kind] * length + ATTENTION.get(op.kind, 0) * self._pair * length * seen

    def moved(self, kind: Kind, index: int, share: int) -> float:
        """Cost of attention of an operation of ``kind`` at slice ``index`` over the ``share`` oldest slices."""
        return ATTENTION[kind] * self._pair * self._lengths[index] * self.before[share]

    def forth_and_back(self, index: int) -> int:
        """Ticks of slice ``index`` through one chunk and back."""
        return sum(self.ticks(Op(kind, 0, 0, index)) for kind in (Kind.FORWARD, Kind.BACKWARD))

    def ticks(self, op: Op, exchange: Op | None = None) -> int:
        """Of a clock, above 0, for ``op``; shared as ``exchange`` says, but for the waits of the two for each other."""
        cost = self.alone(op)
        if exchange is not None and exchange.partner is not None:
            giver = op.slice if exchange.share > 0 else exchange.partner[2]
            moved = self.moved(op.kind, giver, abs(exchange.share))
            cost += -moved if exchange.share > 0 else moved
        return max(1, round(TICKS * cost))


ATTENTION: Mapping[Kind, int] = MappingProxyType({Kind.FORWARD: 1, Kind.BACKWARD: 2, Kind.INPUT_BACKWARD: 2})
"""Cost of attention, as multiples of the forward's."""

_LINEAR: Mapping[Kind, float] = MappingProxyType(
    {
        Kind.FORWARD: 1.0,
        Kind.BACKWARD: 2.0,
        Kind.INPUT_BACKWARD: 1.0,
        Kind.WEIGHT_BACKWARD: 1.0,
        Kind.LOSS: 0.0,
        Kind.EMBED: 0.05,
        Kind.EMBED_BACKWARD: 0.05,
    }
)
"""Cost of everything else."""
