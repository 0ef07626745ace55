"""Puts the operations of embedding, output layer and weight gradients between the forwards and backwards.

By a clock: all ranks are simulated, and each rank, whenever it is free, does the first of

    1. what others wait for: the loss, rows of the embedding, its part of the output layer
    2. gradients of weights of which too many wait, so that what they hold stays bounded
    3. its next forward or backward
    4. other gradients of weights, which nobody waits for

that is ready by that clock. Forwards and backwards keep their order. An operation is placed only after everything that
it needs, so the lists of all ranks together have no circle.
"""

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush

from thresher.pipeline.schedule.clock import COSTS
from thresher.pipeline.schedule.graph import Node, feeds, identity, needs
from thresher.pipeline.schedule.ops import Kind, Op, Shape
from thresher.pipeline.schedule.orders import Orders


def place(shape: Shape, orders: Orders) -> Orders:
    """All compute operations of every rank, from its forwards and backwards.

    Args:
        shape: what to split.
        orders: FORWARD and BACKWARD operations by rank.
    """
    mains = [_with_loss(shape, rank, _split_drain(shape, order)) for rank, order in enumerate(orders)]
    if not (shape.split_embedding or shape.split_head or shape.split_backward):
        return tuple(map(tuple, mains))
    return _Clock(shape, mains).run()


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

    def __init__(self, shape: Shape, mains: list[list[Op]]) -> None:
        self.shape = shape
        self.queues = [{kind: deque[Op]() for kind in COSTS} for _ in mains]
        self.lists: list[list[Op]] = [[] for _ in mains]
        self.free = [0] * len(mains)
        self.missing: dict[Node, int] = {}
        self.ready: dict[Node, int] = {}
        self.wakes: list[tuple[int, int]] = []
        self.awaited: set[tuple[int, int]] = set()
        self.entered = 0
        self._fill(mains)

    def _fill(self, mains: list[list[Op]]) -> None:
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

    def run(self) -> Orders:
        """The lists, when all is done."""
        for rank in range(self.shape.stages):
            self._wake(0, rank)
        while self.wakes:
            time, rank = heappop(self.wakes)
            self.awaited.discard((time, rank))
            chosen = self._choose(rank, time) if self.free[rank] <= time else None
            if chosen is not None:
                self._start(rank, self.queues[rank][chosen].popleft(), time)
        assert not any(queue for queues in self.queues for queue in queues.values()), "a forward or backward is stuck"
        return tuple(map(tuple, self.lists))

    def _choose(self, rank: int, time: int) -> Kind | None:
        """The queue whose head to do now."""
        for kind, waiting in self._preferences(rank):
            queue = self.queues[rank][kind]
            if len(queue) > waiting and self._is_ready(rank, queue[waiting], time):
                return kind
        return None

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
        end = self.free[rank] = time + COSTS[op.kind]
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
