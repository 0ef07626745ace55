"""Numbers of a timeline, and how schedules compare: as data and as lines of text."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.graph import EXCHANGES
from thresher.pipeline.schedule.ops import POLICIES, Kind, Op, Shape
from thresher.pipeline.schedule.orders import check_shape
from thresher.pipeline.simulate.costs import TOKENS, Costs
from thresher.pipeline.simulate.link import Wire
from thresher.pipeline.simulate.memory import Footprint, Memory, predict_memory
from thresher.pipeline.simulate.simulator import simulate
from thresher.pipeline.simulate.timeline import Timeline

PLAIN = Footprint(activations=1.0)
"""One byte per token and layer: shares of a microbatch instead of bytes."""


def numbers(timeline: Timeline, memory: Memory, whole_bytes: float) -> dict[str, object]:
    """What a machine wants to know of a timeline; JSON types only.

    Args:
        timeline: of a step.
        memory: predicted for it.
        whole_bytes: M_a, one microbatch through all layers; ``peak_share`` counts in it.

    Returns:
        ``bubble`` (of ideal time) and ``bubbles`` by rank, ``makespan_s``, ``ideal_s``; by rank ``peak_slices``,
        ``peak_share``, ``ops`` (what it executes, in order) and ``counts`` of operations by kind.
    """
    ranks = timeline.schedule.ranks
    return {
        "shape": asdict(timeline.schedule.shape),
        "bubble": timeline.bubble,
        "bubbles": list(timeline.bubbles),
        "makespan_s": timeline.makespan,
        "ideal_s": timeline.ideal,
        "peak_slices": list(timeline.peak_slices),
        "peak_share": [memory.peak(rank).total / whole_bytes for rank in range(len(ranks))],
        "counts": [dict(Counter(str(op.kind) for op in ops)) for ops in ranks],
        "ops": [[label(op) for op in ops] for ops in ranks],
    }


def label(op: Op) -> str:
    """Short spelling: kind, then (microbatch, chunk, slice), then payload, peer and share where there are any.

    >>> label(Op(Kind.FORWARD, 0, 1, 2))
    'F(0,1,2)'
    """
    place = f"{op.kind}({op.microbatch},{op.chunk},{op.slice})"
    if op.payload is not None:
        return f"{place} {op.payload} {'<-' if op.kind is Kind.RECEIVE else '->'} {op.peer}"
    return f"{place} {op.share:+d} {op.peer}" if op.kind in EXCHANGES else place


@dataclass(frozen=True)
class Study:
    """One step whose layers all cost the same, to see what a schedule alone does.

    Time is in units of one forward of one slice through one chunk without attention.

    Attributes:
        shape: of the schedule; its numbers of slices and chunks say how large the work is, also for policies that
            cannot have them (see :meth:`adapted`).
        attention: mean cost of attention over that of everything else.
        exchange: how attention is shared; None for not at all.
        head: cost of the output layer on a whole microbatch, forward and backward, over that of one layer's forward.
    """

    shape: Shape
    attention: float = 0.0
    exchange: ExchangeRule | None = None
    head: float = 0.0

    def costs(self, policy_shape: Shape) -> Costs:
        """For ``policy_shape``, which cuts the same microbatch and the same layers in another way."""
        whole = Costs.uniform(self.shape.slices, attention=self.attention)
        bounds = whole.bounds if policy_shape.slices == self.shape.slices else (0, whole.bounds[-1])
        depth = self.shape.chunks // policy_shape.chunks
        half = replace(whole.forward, per_pair=0.0).scaled(self.head / 2)
        layers = (depth,) * (policy_shape.stages * policy_shape.chunks)
        return replace(whole, bounds=bounds, layers=layers, head=half, head_weight=half)

    @property
    def whole_bytes(self) -> float:
        """M_a of :data:`PLAIN`."""
        return PLAIN.microbatch_bytes(TOKENS * self.shape.slices, self.shape.stages * self.shape.chunks)

    def run(self, wire: Wire) -> tuple[Timeline, Memory]:
        """Builds, simulates and weighs the schedule.

        Raises:
            ScheduleError: there is no such schedule.
        """
        return self._run(self.adapted(self.shape.policy), self.exchange, wire)

    def adapted(self, policy: str) -> Shape:
        """The shape in which ``policy`` does this work: one slice, one deep chunk where it knows no others."""
        slices = 1 if policy in ("gpipe", "1f1b", "interleaved") else self.shape.slices
        chunks = 1 if policy in ("gpipe", "1f1b", "terapipe", "seq1f1b") else self.shape.chunks
        return replace(self.shape, policy=policy, slices=slices, chunks=chunks)

    def compare(self, wire: Wire) -> list[tuple[str, Timeline | str, float]]:
        """The same work by every policy: its name, its timeline (or why there is none), its peak share.

        Each in the shape that :meth:`adapted` gives it.
        """
        rows: list[tuple[str, Timeline | str, float]] = []
        for name, shape, rule in self._rivals():
            try:
                timeline, memory = self._run(shape, rule, wire)
            except ScheduleError as error:
                rows.append((name, error.what, 0.0))
            else:
                rows.append((name, timeline, memory.worst / self.whole_bytes))
        return rows

    def _rivals(self) -> Iterable[tuple[str, Shape, ExchangeRule | None]]:
        for policy in reversed(POLICIES):
            yield policy, self.adapted(policy), None
        if self.attention:
            yield "slimpipe, exchange", replace(self.shape, policy="slimpipe"), self.exchange or self.rule(0, 0.0)

    def rule(self, limit: int, latency: float) -> ExchangeRule:
        """Sharing of at most ``limit`` slices (0: as many as pay) over lines of ``latency``, on these costs."""
        return ExchangeRule(limit=limit, transfer=0.0, latency=latency)

    def _run(self, shape: Shape, rule: ExchangeRule | None, wire: Wire) -> tuple[Timeline, Memory]:
        check_shape(shape)
        costs = self.costs(shape)
        schedule = build_schedule(
            shape.stages,
            shape.chunks,
            shape.microbatches,
            shape.slices,
            shape.slack,
            shape.policy,
            split_embedding=shape.split_embedding,
            split_head=shape.split_head,
            split_backward=shape.split_backward,
            exchange=rule,
            work=costs.work(shape.stages),
        )
        timeline = simulate(schedule, costs, wire)
        return timeline, predict_memory(timeline, costs, PLAIN)
