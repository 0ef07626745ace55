"""Puts the operations of embedding, output layer and weight gradients between the forwards and backwards.

By a clock: all ranks are simulated, and each rank, whenever it is free, does the first of

    1. what others wait for: the loss, rows of the embedding, its part of the output layer
    2. gradients of weights of which too many wait, so that what they hold stays bounded
    3. its next forward or backward
    4. other gradients of weights, which nobody waits for

that is ready by that clock. Two ranks that share attention start together. A rank rather waits for its part of the
output layer than to begin something longer, where the last rank cannot go on without. Forwards and backwards keep
their order. An operation is placed only after everything that it needs, so the lists of all ranks together have no
circle.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from thresher.pipeline.schedule.graph import Node, feeds, identity, needs, partner
from thresher.pipeline.schedule.ops import Kind, Op, Shape
from thresher.pipeline.schedule.orders import Orders
from thresher.pipeline.schedule.work import Prices

Exchanges = Sequence[Mapping[Op, Op]]
"""By rank: a forward or backward (see :func:`~thresher.pipeline.schedule.graph.identity`) -> the exchange before it."""

_QUEUES = (
    *(Kind.FORWARD, Kind.LOSS, Kind.HEAD, Kind.HEAD_WEIGHT, Kind.EMBED, Kind.EMBED_BACKWARD),
    Kind.WEIGHT_BACKWARD,
)


class Placed(NamedTuple):
    """Lists of all compute operations, with how they share attention, and the tick at which the last one ends."""

    lists: Orders
    exchanges: Exchanges
    span: int


def main_lists(shape: Shape, orders: Orders) -> Orders:
    """Forwards and backwards by rank as they are executed: the last ones without gradients of weights where those are
    separate, and losses among them where the output layer is not cut.
    """
    return tuple(tuple(_with_loss(shape, rank, _split_drain(shape, order))) for rank, order in enumerate(orders))


def place(shape: Shape, mains: Orders, prices: Prices, exchanges: Exchanges) -> Placed:
    """All compute operations of every rank.

    Args:
        shape: what to split.
        mains: see :func:`main_lists`.
        prices: what operations cost.
        exchanges: by rank, forwards and backwards that share their attention, and how.
    """
    return _Clock(shape, mains, prices, exchanges).run()


def _split_drain(shape: Shape, order: Iterable[Op]) -> list[Op]:
    """Backwards after the last forward without the gradients of weights."""
    ops = list(order)
    if not shape.split_backward:
        return ops
    border = 1 + max(at for at, op in enumerate(ops) if op.kind is Kind.FORWARD)
    return ops[:border] + [Op(Kind.INPUT_BACKWARD, op.microbatch, op.chunk, op.slice) for op in ops[border:]]


def _with_loss(shape: Shape, rank: int, ops: list[Op]) -> list[Op]:
    """With a loss after each forward of the last stage, where the output layer is not cut."""
    if shape.split_head or rank != shape.stages - 1:
        return ops
    placed = []
    for op in ops:
        placed.append(op)
        if op.kind is Kind.FORWARD and op.chunk == shape.chunks - 1:
            placed.append(Op(Kind.LOSS, op.microbatch, op.chunk, op.slice))
    return placed


class _Clock:
    """The simulation. Queues hold what a rank has still to do, by kind and in order; mains under FORWARD."""

    def __init__(self, shape: Shape, mains: Orders, prices: Prices, exchanges: Exchanges) -> None:
        self.shape, self.prices, self.exchanges = shape, prices, exchanges
        self.queues = [{kind: deque[Op]() for kind in _QUEUES} for _ in mains]
        self.lists: list[list[Op]] = [[] for _ in mains]
        self.free = [0] * len(mains)
        self.missing: dict[Node, int] = {}
        self.ready: dict[Node, int] = {}
        self.wakes: list[tuple[int, int]] = []
        self.awaited: set[tuple[int, int]] = set()
        self.entered = 0
        self._fill(mains)

    def _fill(self, mains: Orders) -> None:
        first = [op for op in mains[0] if op.chunk == 0 and op.kind is not Kind.LOSS]
        last = [op for op in mains[-1] if op.chunk == self.shape.chunks - 1 and op.kind is Kind.FORWARD]
        for rank, (queue, ops) in enumerate(zip(self.queues, mains, strict=True)):
            queue[Kind.FORWARD].extend(ops)
            if self.shape.split_embedding:
                queue[Kind.EMBED].extend(_renamed(Kind.EMBED, first, forward=True))
                queue[Kind.EMBED_BACKWARD].extend(_renamed(Kind.EMBED_BACKWARD, first, forward=False))
            if self.shape.split_head:
                queue[Kind.HEAD].extend(_renamed(Kind.HEAD, last, forward=True))
                queue[Kind.HEAD_WEIGHT].extend(_renamed(Kind.HEAD_WEIGHT, last, forward=True))
            if self.shape.split_head and rank == self.shape.stages - 1:
                queue[Kind.LOSS].extend(_renamed(Kind.LOSS, last, forward=True))

    def run(self) -> Placed:
        """The lists, when all is done."""
        for rank in range(self.shape.stages):
            self._wake(0, rank)
        while self.wakes:
            time, rank = heappop(self.wakes)
            self.awaited.discard((time, rank))
            if self.free[rank] <= time:
                self._go_on(rank, time)
        assert not any(queue for queues in self.queues for queue in queues.values()), "a forward or backward is stuck"
        return Placed(tuple(map(tuple, self.lists)), self.exchanges, max(self.free))

    def _go_on(self, rank: int, time: int) -> None:
        """Starts what ``rank``, which is free, does now."""
        ready = self._ready(rank, time)
        kind = next((kind for kind in ready if kind is not Kind.FORWARD or self._runs(rank, time)), None)
        if kind is None:
            return
        exchange = self._exchange(rank) if kind is Kind.FORWARD else None
        for each in (rank,) if exchange is None else (rank, exchange.peer):
            self._start(each, self.queues[each][kind].popleft(), time)

    def _runs(self, rank: int, time: int) -> bool:
        """Whether ``rank`` goes on with its next forward or backward, which is ready."""
        exchange = self._exchange(rank)
        if exchange is None:
            return not self._waits(rank, time)
        peer, other = partner(exchange)
        queue = self.queues[peer][Kind.FORWARD]
        if self.free[peer] > time or not queue or identity(queue[0]) != other:
            return False
        wanted = next(self._ready(peer, time), None)
        return wanted is Kind.FORWARD and not self._waits(rank, time) and not self._waits(peer, time)

    def _waits(self, rank: int, time: int) -> bool:
        """Whether ``rank`` had better wait for its part of the output layer, as the last rank can do nothing without.

        That is: for no longer than its next forward or backward takes.
        """
        heads, last = self.queues[rank][Kind.HEAD], self.queues[-1][Kind.FORWARD]
        if not heads or not last or self._count((rank, heads[0])):
            return False
        is_next = identity(last[0]) == Op(Kind.BACKWARD, heads[0].microbatch, heads[0].chunk, heads[0].slice)
        left = self.ready[rank, heads[0]] - time
        return is_next and left <= self._ticks(rank, self.queues[rank][Kind.FORWARD][0])

    def _exchange(self, rank: int) -> Op | None:
        """How the next forward or backward of ``rank``, if any, is shared."""
        queue = self.queues[rank][Kind.FORWARD]
        return self.exchanges[rank].get(identity(queue[0])) if queue else None

    def _ready(self, rank: int, time: int) -> Iterator[Kind]:
        """The queues whose heads ``rank`` could do now, the most urgent first."""
        for kind, waiting in self._preferences(rank):
            queue = self.queues[rank][kind]
            if len(queue) > waiting and self._is_ready(rank, queue[waiting], time):
                yield kind

    def _ticks(self, rank: int, op: Op) -> int:
        return self.prices.ticks(op, self.exchanges[rank].get(identity(op)))

    def _preferences(self, rank: int) -> Iterable[tuple[Kind, int]]:
        """Queues in order of urgency, and how many entries before the one that must be ready."""
        yield Kind.LOSS, 0
        if len(self.queues[0][Kind.EMBED]) == 0 or self._wants_rows(rank):
            yield Kind.EMBED, 0
        yield Kind.HEAD, 0
        yield Kind.HEAD_WEIGHT, self.shape.slack
        yield Kind.EMBED_BACKWARD, self.shape.stages
        yield Kind.WEIGHT_BACKWARD, self.shape.slack
        for kind in (Kind.FORWARD, Kind.HEAD_WEIGHT, Kind.EMBED_BACKWARD, Kind.WEIGHT_BACKWARD):
            yield kind, 0

    def _wants_rows(self, rank: int) -> bool:
        """Whether rank 0 is about to need the next rows of ``rank``: its own at once, those of others in p slices."""
        done = self.shape.microbatches * self.shape.slices - len(self.queues[rank][Kind.EMBED])
        return done < self.entered + (self.shape.stages if rank else 1)

    def _is_ready(self, rank: int, op: Op, time: int) -> bool:
        node = (rank, identity(op)) if op.kind is Kind.INPUT_BACKWARD else (rank, op)
        return self._count(node) == 0 and self.ready.get(node, 0) <= time

    def _count(self, node: Node) -> int:
        """How many of the needs of ``node`` have not even started."""
        if node not in self.missing:
            self.missing[node] = len(needs(self.shape, *node))
        return self.missing[node]

    def _start(self, rank: int, op: Op, time: int) -> None:
        end = self.free[rank] = time + self._ticks(rank, op)
        self.lists[rank].append(op)
        if op.kind is Kind.INPUT_BACKWARD:
            weights = Op(Kind.WEIGHT_BACKWARD, op.microbatch, op.chunk, op.slice)
            self.queues[rank][Kind.WEIGHT_BACKWARD].append(weights)
        if op.kind is Kind.FORWARD and rank == op.chunk == 0:
            self.entered += 1
            for other in range(self.shape.stages):
                self._wake(time, other)
        for feed in feeds(self.shape, rank, op):
            node = (feed.rank, feed.op)
            self.missing[node] = self._count(node) - 1
            self.ready[node] = max(self.ready.get(node, 0), end)
            self._wake(end, feed.rank)
        self._wake(end, rank)

    def _wake(self, time: int, rank: int) -> None:
        if (time, rank) not in self.awaited:
            self.awaited.add((time, rank))
            heappush(self.wakes, (time, rank))


def _renamed(kind: Kind, ops: Iterable[Op], *, forward: bool) -> list[Op]:
    return [Op(kind, op.microbatch, op.chunk, op.slice) for op in ops if (op.kind is Kind.FORWARD) == forward]
