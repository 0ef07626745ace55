"""Runs the lists of a schedule on paper: when each operation starts and ends, and who waits for whom.

Every time is a maximum of earlier times plus a duration, so the order in which ranks are looked at does not matter:
each rank goes on until it needs something that has no time yet, and is woken when that has one.

    SEND      takes no time; RECEIVE neither
    transfer  starts when both its SEND and its RECEIVE are executed and the one before it on the same edge (source,
              target, payload) has ended; it takes what the link says
    RELEASE   waits for the end of its transfer
    compute   waits for the transfers it consumes

Shared attention (context exchange): in each layer the helper does its own attention, and then, once it has been asked,
the part that is moved; the giver goes on when it has done its own part and the result is back:

    giver   |-- QKV --|-- own attention --|......|-- MLP --|        in backward the same from right to left
               asks \\__________              / answers
    helper        |-- QKV --|-- own attention --|-- moved --|-- MLP --|
"""

from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.graph import Need, needs
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Schedule
from thresher.pipeline.simulate.costs import Costs
from thresher.pipeline.simulate.link import INSTANT, Wire
from thresher.pipeline.simulate.timeline import Step, Timeline, Transfer


def simulate(schedule: Schedule, costs: Costs, wire: Wire = INSTANT, *, peers_wait: bool = True) -> Timeline:
    """When everything in ``schedule`` happens.

    Args:
        schedule: with or without exchanges; its lists are executed as they are.
        costs: of operations and sizes of messages, for as many slices as the schedule has.
        wire: between ranks; free by default.
        peers_wait: False counts only the work that an exchange moves, and neither messages nor waits of the two for
            each other: what published figures are made of.

    Raises:
        ScheduleError: costs are of another number of slices, or ranks wait for each other in a circle.
    """
    slices = len(costs.bounds) - 1
    if slices != schedule.shape.slices:
        raise ScheduleError(
            f"costs are of {slices} slices, the schedule of {schedule.shape.slices}",
            where="simulate",
            fix="make both for the same number of slices",
        )
    return _Walk(schedule, costs, wire, peers_wait).run()


class _Message(NamedTuple):
    payload: Payload
    source: int
    target: int
    microbatch: int
    chunk: int
    slice: int


class _Edge:
    """Transfers of one payload from one rank to another, first come, first served."""

    def __init__(self) -> None:
        self.sends: deque[tuple[_Message, Op, float]] = deque()
        self.receives: deque[tuple[_Message, float]] = deque()
        self.free = 0.0


class _Offer(NamedTuple):
    """One side of a shared operation that is ready to start.

    Attributes:
        ready: seconds.
        alone: what the operation takes without sharing.
        op: the operation.
    """

    ready: float
    alone: float
    op: Op


class _Walk:
    def __init__(self, schedule: Schedule, costs: Costs, wire: Wire, peers_wait: bool) -> None:
        self.schedule, self.costs, self.wire, self.peers_wait = schedule, costs, wire, peers_wait
        world = range(schedule.shape.stages)
        self.at = [0 for _ in world]
        self.clock = [0.0 for _ in world]
        self.steps: list[list[Step]] = [[] for _ in world]
        self.bound: list[Op | None] = [None for _ in world]
        self.edges: dict[tuple[Payload, int, int], _Edge] = {}
        self.arrived: dict[_Message, float] = {}
        self.offers: dict[tuple[int, Kind, tuple[int, int, int]], _Offer] = {}
        self.transfers: list[Transfer] = []
        self.waiting: dict[Hashable, int] = {}
        self.ready = deque(world)

    def run(self) -> Timeline:
        while self.ready:
            rank = self.ready.popleft()
            ops = self.schedule.ranks[rank]
            while self.at[rank] < len(ops) and self._execute(rank, ops[self.at[rank]]):
                self.at[rank] += 1
        self._require_done()
        by_arrival = sorted(self.transfers, key=lambda transfer: transfer.end)
        return Timeline(self.schedule, tuple(map(tuple, self.steps)), tuple(by_arrival))

    def _execute(self, rank: int, op: Op) -> bool:
        """Whether ``op`` could be executed; if not, ``rank`` is woken when it is worth another try."""
        match op.kind:
            case Kind.SEND | Kind.RECEIVE:
                self._post(rank, op)
                return self._done(rank, op, self.clock[rank])
            case Kind.RELEASE:
                message = _message(rank, op)
                return self._is_here(rank, [message]) and self._done(rank, op, self.arrived[message])
            case Kind.EXCHANGE_FORWARD | Kind.EXCHANGE_BACKWARD:
                self.bound[rank] = op
                return self._done(rank, op, self.clock[rank])
            case _:
                return self._compute(rank, op)

    def _done(self, rank: int, op: Op, end: float) -> bool:
        start = self.clock[rank]
        self.clock[rank] = max(start, end)
        self.steps[rank].append(Step(op, start, self.clock[rank]))
        return True

    def _post(self, rank: int, op: Op) -> None:
        message = _message(rank, op)
        edge = self.edges.setdefault(message[:3], _Edge())
        if op.kind is Kind.SEND:
            edge.sends.append((message, op, self.clock[rank]))
        else:
            edge.receives.append((message, self.clock[rank]))
        while edge.sends and edge.receives:
            self._transfer(edge)

    def _transfer(self, edge: _Edge) -> None:
        (message, op, sent), (wanted, posted) = edge.sends.popleft(), edge.receives.popleft()
        if message != wanted:
            raise ScheduleError(
                f"rank {message.source} sends {op}, but rank {message.target} receives that of microbatch "
                f"{wanted.microbatch}, chunk {wanted.chunk}, slice {wanted.slice}",
                where="schedule",
            )
        start, size = max(sent, posted, edge.free), self.costs.message_bytes(op)
        edge.free = start + self.wire.seconds(message.source, message.target, size)
        self.arrived[message] = edge.free
        self.transfers.append(Transfer(op, message.source, message.target, sent, start, edge.free, size))
        self._wake(message)

    def _is_here(self, rank: int, messages: list[_Message]) -> bool:
        missing = next((message for message in messages if message not in self.arrived), None)
        if missing is not None:
            self.waiting[missing, rank] = rank
        return missing is None

    def _wake(self, message: _Message) -> None:
        for rank in (message.source, message.target):
            if self.waiting.pop((message, rank), None) is not None:
                self.ready.append(rank)

    def _compute(self, rank: int, op: Op) -> bool:
        messages = [_consumed(rank, need) for need in needs(self.schedule.shape, rank, op) if need.payload]
        if not self._is_here(rank, messages):
            return False
        ready = max([self.clock[rank], *(self.arrived[message] for message in messages)])
        alone = self.costs.seconds(self.schedule.shape, rank, op)
        exchange = self.bound[rank]
        if exchange is None:
            return self._ran(rank, op, ready, ready + alone, alone)
        return self._share(rank, exchange, _Offer(ready, alone, op))

    def _ran(self, rank: int, op: Op, start: float, end: float, worked: float) -> bool:
        self.steps[rank].append(Step(op, start, end, worked))
        self.clock[rank] = end
        self.bound[rank] = None
        return True

    def _share(self, rank: int, exchange: Op, own: _Offer) -> bool:
        assert exchange.partner is not None
        key = rank, exchange.kind, (own.op.microbatch, own.op.chunk, own.op.slice)
        other_key = exchange.peer, exchange.kind, exchange.partner
        self.offers[key] = own
        other = self.offers.get(other_key)
        if other is None:
            self.waiting[other_key] = rank
            return False
        if self.waiting.pop(key, None) is not None:
            self.ready.append(exchange.peer)
        gives = exchange.share > 0
        giver, helper = (rank, exchange.peer) if gives else (exchange.peer, rank)
        ends, moved = self._shared(giver, helper, abs(exchange.share), *((own, other) if gives else (other, own)))
        worked = own.alone - moved if gives else own.alone + moved
        end = ends[not gives] if self.peers_wait else own.ready + worked
        return self._ran(rank, own.op, own.ready, end, worked)

    def _shared(
        self, giver: int, helper: int, share: int, gives: _Offer, helps: _Offer
    ) -> tuple[tuple[float, float], float]:
        """When giver and helper end, and the seconds that are moved."""
        shape, costs, op = self.schedule.shape, self.costs, gives.op
        layers = costs.depth(shape.stage(giver, op.chunk))
        moved = costs.moved_seconds(shape, giver, op, share) / layers
        apart = gives.alone / layers - moved, helps.alone / layers
        there, back = costs.exchange_bytes(op.kind, op.slice, share)
        # What is around attention counts for the giver before the helper may begin and again after the result is
        # back; the helper has as much after it sends the result, so all of it can be counted before.
        asks = costs.around_attention(op) + self.wire.seconds(giver, helper, there)
        answers = self.wire.seconds(helper, giver, back)
        end, helping = gives.ready, helps.ready
        for _ in range(layers):
            helping = max(helping + apart[1], end + asks) + moved
            end = max(end + apart[0], helping + answers)
        return (end, helping), layers * moved

    def _require_done(self) -> None:
        stuck = [
            f"rank {rank} at entry {at}, {ops[at]}"
            for rank, (at, ops) in enumerate(zip(self.at, self.schedule.ranks, strict=True))
            if at < len(ops)
        ]
        if stuck:
            raise ScheduleError(f"ranks wait for each other: {'; '.join(stuck)}", where="schedule")


def _message(rank: int, op: Op) -> _Message:
    """The message that SEND, RECEIVE or RELEASE ``op`` in the list of ``rank`` is about."""
    assert op.payload is not None
    source, target = (op.peer, rank) if op.kind is Kind.RECEIVE else (rank, op.peer)
    return _Message(op.payload, source, target, op.microbatch, op.chunk, op.slice)


def _consumed(rank: int, need: Need) -> _Message:
    assert need.payload is not None
    return _Message(need.payload, need.rank, rank, need.op.microbatch, need.op.chunk, need.op.slice)
