"""How many bytes each rank holds over a step, by kind: what a measured run can be compared with, byte by byte."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

from thresher.pipeline.schedule.graph import needs
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Shape
from thresher.pipeline.simulate.costs import Costs
from thresher.pipeline.simulate.timeline import Step, Timeline


class Holding(StrEnum):
    """What bytes are held for."""

    STATES = "states"
    """Parameters, their gradients, the optimizer: all the time."""
    ACTIVATIONS = "activations"
    """Saved for backward, without keys and values."""
    KEYS_VALUES = "keys and values"
    """Pools of chunks, as large as the most slices that live at once need."""
    ACCUMULATORS = "gradients of keys and values"
    """Of slices whose backward is still to come."""
    LOGITS = "logits"
    EXCHANGE = "exchange"
    """Of one layer of a shared operation: what a helper was sent and answers, what a giver gets back."""
    RECEIVED = "receive buffers"
    """From RECEIVE until the stage takes the message over."""
    SENT = "sends"
    """From SEND to RELEASE."""


@dataclass(frozen=True)
class Footprint:
    """What one token costs, in bytes.

    Attributes:
        activations: per layer, saved for backward, with the input of the layer and without keys and values.
        key_value: per layer, keys and values.
        accumulators: per layer, their gradients: usually fp32.
        logits: of the whole output layer, with everything of that size that is kept beside them.
        states: bytes per rank that are no token's: parameters, gradients, optimizer.
        kept_for_weights: share of activations that lives on between INPUT_BACKWARD and WEIGHT_BACKWARD.
    """

    activations: float
    key_value: float = 0.0
    accumulators: float = 0.0
    logits: float = 0.0
    states: float = 0.0
    kept_for_weights: float = 1.0

    def microbatch_bytes(self, tokens: int, layers: int) -> float:
        """M_a: activations, keys and values of ``tokens`` tokens in all layers."""
        return (self.activations + self.key_value) * tokens * layers


class Point(NamedTuple):
    """What a rank holds from ``time`` seconds on.

    Attributes:
        time: seconds from the beginning of the step.
        held: bytes by kind; kinds that hold nothing may be left out.
    """

    time: float
    held: dict[Holding, float]

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Memory:
    """What every rank holds over a step.

    Attributes:
        curves: by rank, rising times.
    """

    curves: tuple[tuple[Point, ...], ...]

    def peak(self, rank: int) -> Point:
        """When ``rank`` holds most."""
        return max(self.curves[rank], key=lambda point: point.total)

    def most(self, rank: int, *kinds: Holding) -> float:
        """Most bytes that ``kinds`` together take at any one time."""
        return max(sum(point.held.get(kind, 0.0) for kind in kinds) for point in self.curves[rank])

    @property
    def worst(self) -> float:
        """Most bytes that any rank holds."""
        return max(self.peak(rank).total for rank in range(len(self.curves)))


def slimpipe_bytes(microbatch_bytes: float, shape: Shape, rank: int) -> float:
    """Peak of activations, keys and values by the paper's formula, M_a / p * (1 + w (p - 1 - r) / (n v)).

    Args:
        microbatch_bytes: M_a, of one microbatch through all layers.
        shape: with policy "slimpipe"; n v m is at least the number of slices in flight.
        rank: r.
    """
    share = shape.slack * (shape.stages - 1 - rank) / (shape.slices * shape.chunks)
    return microbatch_bytes / shape.stages * (1 + share)


def predict_memory(timeline: Timeline, costs: Costs, footprint: Footprint) -> Memory:
    """What every rank holds while ``timeline`` runs.

    Args:
        timeline: as simulated with ``costs``.
        costs: for lengths of slices, layers of stages and sizes of messages.
        footprint: of the model.
    """
    ranks = range(timeline.schedule.shape.stages)
    return Memory(tuple(_curve(_Rank(timeline, costs, footprint, rank).changes()) for rank in ranks))


class _Change(NamedTuple):
    time: float
    kind: Holding
    bytes: float


def _curve(changes: Iterable[_Change]) -> tuple[Point, ...]:
    """Of changes in the order in which they are executed; those of one moment keep that order within a peak."""
    held: dict[Holding, float] = {}
    points = []
    for time, group in groupby(sorted(changes, key=lambda change: change.time), key=lambda change: change.time):
        for change in group:
            held = {**held, change.kind: held.get(change.kind, 0.0) + change.bytes}
            points.append(Point(time, held))
    return tuple(points)


class _Rank:
    """Changes of one rank."""

    def __init__(self, timeline: Timeline, costs: Costs, footprint: Footprint, rank: int) -> None:
        self.shape, self.steps = timeline.schedule.shape, timeline.steps[rank]
        self.end = timeline.makespan
        self.costs, self.footprint, self.rank = costs, footprint, rank
        self.pools = self._pool_tokens()
        self.live = dict.fromkeys(self.pools, 0)

    def changes(self) -> Iterator[_Change]:
        yield _Change(0.0, Holding.STATES, self.footprint.states)
        gone = self._releases()
        exchange: Op | None = None
        for step in self.steps:
            op = step.op
            if op.kind is Kind.SEND:
                yield from self._for(Holding.SENT, self.costs.message_bytes(op), step.start, gone[_key(op)])
            elif op.kind is Kind.RECEIVE:
                yield _Change(step.start, Holding.RECEIVED, self.costs.message_bytes(op))
            elif op.kind in (Kind.EXCHANGE_FORWARD, Kind.EXCHANGE_BACKWARD):
                exchange = op
            elif op.kind is not Kind.RELEASE:
                yield from self._compute(step, exchange)
                exchange = None

    def _for(self, kind: Holding, size: float, start: float, end: float) -> Iterator[_Change]:
        yield _Change(start, kind, size)
        yield _Change(end, kind, -size)

    def _releases(self) -> dict[tuple[Payload | None, int, int, int, int], float]:
        """When each message that is sent is gone: at its RELEASE, or with the step."""
        gone = {_key(step.op): self.end for step in self.steps if step.op.kind is Kind.SEND}
        return gone | {_key(step.op): step.end for step in self.steps if step.op.kind is Kind.RELEASE}

    def _compute(self, step: Step, exchange: Op | None) -> Iterator[_Change]:
        op = step.op
        yield from self._taken(step)
        if exchange is not None:
            yield from self._for(Holding.EXCHANGE, self._exchange_bytes(exchange, op), step.start, step.end)
        match op.kind:
            case Kind.FORWARD:
                yield _Change(step.start, Holding.ACTIVATIONS, self._activations(op))
                yield from self._keys_values(op, step.start, 1)
            case Kind.BACKWARD | Kind.INPUT_BACKWARD | Kind.WEIGHT_BACKWARD:
                yield from self._backward(step)
            case Kind.HEAD:
                yield _Change(step.start, Holding.LOGITS, self._logits(op))
            case Kind.HEAD_WEIGHT:
                yield _Change(step.end, Holding.LOGITS, -self._logits(op))
            case Kind.LOSS if not self.shape.split_head:
                yield from self._for(Holding.LOGITS, self._logits(op), step.start, step.end)

    def _taken(self, step: Step) -> Iterator[_Change]:
        """Receive buffers: an activation becomes a saved tensor at once, anything else is freed with the operation."""
        for need in needs(self.shape, self.rank, step.op):
            if need.payload is not None:
                message = Op(Kind.SEND, need.op.microbatch, need.op.chunk, need.op.slice, need.payload, self.rank)
                time = step.start if need.payload is Payload.ACTIVATION else step.end
                yield _Change(time, Holding.RECEIVED, -self.costs.message_bytes(message))

    def _backward(self, step: Step) -> Iterator[_Change]:
        op, n = step.op, self.shape.slices
        size = self._activations(op)
        waiting = size * self.footprint.kept_for_weights
        if op.kind is Kind.WEIGHT_BACKWARD:
            yield _Change(step.end, Holding.ACTIVATIONS, -waiting)
            return
        prefix = self._layers(op.chunk) * self.costs.batch * self.costs.bounds[n - 1] * self.footprint.accumulators
        if op.slice == n - 1:
            yield _Change(step.start, Holding.ACCUMULATORS, prefix)
        if op.slice == 0:
            yield _Change(step.end, Holding.ACCUMULATORS, -prefix)
        yield _Change(step.end, Holding.ACTIVATIONS, waiting - size if op.kind is Kind.INPUT_BACKWARD else -size)
        yield from self._keys_values(op, step.end, -1)

    def _keys_values(self, op: Op, time: float, sign: int) -> Iterator[_Change]:
        """A pool is there, whole, from its first slice until its last live one is gone."""
        before = self.live[op.chunk]
        after = self.live[op.chunk] = before + sign * self.costs.tokens(op.slice)
        if not before or not after:
            size = self._layers(op.chunk) * self.pools[op.chunk] * self.footprint.key_value
            yield _Change(time, Holding.KEYS_VALUES, sign * size)

    def _pool_tokens(self) -> dict[int, int]:
        """By chunk, most tokens whose keys and values live at once."""
        live = dict.fromkeys(range(self.shape.chunks), 0)
        most = dict(live)
        for step in self.steps:
            op = step.op
            if op.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD):
                live[op.chunk] += self.costs.tokens(op.slice) * (1 if op.kind is Kind.FORWARD else -1)
                most[op.chunk] = max(most[op.chunk], live[op.chunk])
        return most

    def _exchange_bytes(self, exchange: Op, op: Op) -> float:
        """A helper holds what it is sent and what it answers, a giver what it gets back."""
        assert exchange.partner is not None
        index = op.slice if exchange.share > 0 else exchange.partner[2]
        there, back = self.costs.exchange_bytes(op.kind, index, abs(exchange.share))
        return back if exchange.share > 0 else there + back

    def _layers(self, chunk: int) -> int:
        return self.costs.depth(self.shape.stage(self.rank, chunk))

    def _activations(self, op: Op) -> float:
        return self._layers(op.chunk) * self.costs.tokens(op.slice) * self.footprint.activations

    def _logits(self, op: Op) -> float:
        parts = self.shape.stages if self.shape.split_head else 1
        return self.costs.tokens(op.slice) * self.footprint.logits / parts


def _key(op: Op) -> tuple[Payload | None, int, int, int, int]:
    return op.payload, op.peer, op.microbatch, op.chunk, op.slice
