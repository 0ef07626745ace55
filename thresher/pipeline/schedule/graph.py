"""What each operation waits for: the one place that knows, shared by builder, validator and simulator.

Only *compute* operations are nodes; transfers are edges between ranks, exchanges tie two nodes together. An
INPUT_BACKWARD is the same node as the BACKWARD it stands for. With S the stage of (rank, chunk):

    F(S, k, i)    after F(S-1, k, i), F(S, k, i-1); of stage 0 with a split embedding: after E(k, i) of every rank
    H(k, i)       after F(last, k, i)
    L(k, i)       after H(k, i) of every rank; without a split head: after F(last, k, i)
    HW(k, i)      after L(k, i) and its own H(k, i)
    B(S, k, i)    after F(S, k, i), B(S+1, k, i), B(S, k, i+1); of the last stage: after L(k, i)
    W(S, k, i)    after B(S, k, i)
    EB(k, i)      after B(0, k, i) and its own E(k, i)
"""

from collections.abc import Iterable
from typing import NamedTuple

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Schedule, Shape

MAIN = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD})
"""Kinds that run layers forth or back."""
TRANSFERS = frozenset({Kind.SEND, Kind.RECEIVE, Kind.RELEASE})
EXCHANGES = frozenset({Kind.EXCHANGE_FORWARD, Kind.EXCHANGE_BACKWARD})
COMPUTE = frozenset(Kind) - TRANSFERS - EXCHANGES


class Need(NamedTuple):
    """One end of a dependency.

    Attributes:
        rank: who executes ``op``.
        op: a compute operation; never INPUT_BACKWARD (see :func:`identity`).
        payload: what has to be transferred; None where both ends are on one rank. The transfer has the microbatch,
            chunk and slice of the *producing* operation.
    """

    rank: int
    op: Op
    payload: Payload | None


def identity(op: Op) -> Op:
    """``op`` as dependencies name it: BACKWARD for INPUT_BACKWARD."""
    if op.kind is Kind.INPUT_BACKWARD:
        return Op(Kind.BACKWARD, op.microbatch, op.chunk, op.slice)
    return op


def needs(shape: Shape, rank: int, op: Op) -> list[Need]:
    """The compute operations that must have ended before the compute operation ``op`` of ``rank`` starts."""
    last = shape.stages - 1
    match op.kind:
        case Kind.FORWARD:
            return _forward_needs(shape, rank, op)
        case Kind.BACKWARD | Kind.INPUT_BACKWARD:
            return _backward_needs(shape, rank, op)
        case Kind.HEAD:
            return [_need(rank, last, _like(op, Kind.FORWARD), Payload.HIDDEN)]
        case Kind.LOSS:
            return _loss_needs(shape, op)
        case Kind.HEAD_WEIGHT:
            loss = _need(rank, last, _like(op, Kind.LOSS), Payload.NORMALISER)
            return [Need(rank, _like(op, Kind.HEAD), None), loss]
        case Kind.WEIGHT_BACKWARD:
            return [Need(rank, _like(op, Kind.BACKWARD), None)]
        case Kind.EMBED_BACKWARD:
            gradient = _need(rank, 0, _like(op, Kind.BACKWARD), Payload.ROW_GRADIENT)
            return [Need(rank, _like(op, Kind.EMBED), None), gradient]
        case _:
            return []


def _forward_needs(shape: Shape, rank: int, op: Op) -> list[Need]:
    found = []
    if rank or op.chunk:
        before, chunk = (rank - 1, op.chunk) if rank else (shape.stages - 1, op.chunk - 1)
        found.append(_need(rank, before, Op(Kind.FORWARD, op.microbatch, chunk, op.slice), Payload.ACTIVATION))
    elif shape.split_embedding:
        found += [_need(rank, owner, _like(op, Kind.EMBED), Payload.ROWS) for owner in range(shape.stages)]
    if op.slice:
        found.append(Need(rank, Op(Kind.FORWARD, op.microbatch, op.chunk, op.slice - 1), None))
    return found


def _backward_needs(shape: Shape, rank: int, op: Op) -> list[Need]:
    found = [Need(rank, _like(op, Kind.FORWARD), None)]
    last = shape.stages - 1
    if shape.stage(rank, op.chunk) == shape.last_stage:
        found.append(Need(rank, _like(op, Kind.LOSS), None))
    else:
        after, chunk = (rank + 1, op.chunk) if rank < last else (0, op.chunk + 1)
        found.append(_need(rank, after, Op(Kind.BACKWARD, op.microbatch, chunk, op.slice), Payload.GRADIENT))
    if op.slice < shape.slices - 1:
        found.append(Need(rank, Op(Kind.BACKWARD, op.microbatch, op.chunk, op.slice + 1), None))
    return found


def _loss_needs(shape: Shape, op: Op) -> list[Need]:
    last = shape.stages - 1
    if not shape.split_head:
        return [Need(last, _like(op, Kind.FORWARD), None)]
    return [_need(last, part, _like(op, Kind.HEAD), Payload.PARTIAL) for part in range(shape.stages)]


def feeds(shape: Shape, rank: int, op: Op) -> list[Need]:
    """The other direction of :func:`needs`: the operations that wait for ``op`` of ``rank``, with what is sent."""
    match op.kind:
        case Kind.FORWARD:
            return _forward_feeds(shape, rank, op)
        case Kind.BACKWARD | Kind.INPUT_BACKWARD:
            return _backward_feeds(shape, rank, op)
        case Kind.EMBED:
            own = Need(rank, _like(op, Kind.EMBED_BACKWARD), None)
            return [_need(rank, 0, _like(op, Kind.FORWARD), Payload.ROWS), own]
        case Kind.HEAD:
            own = Need(rank, _like(op, Kind.HEAD_WEIGHT), None)
            return [_need(rank, shape.stages - 1, _like(op, Kind.LOSS), Payload.PARTIAL), own]
        case Kind.LOSS:
            backward = Need(rank, _like(op, Kind.BACKWARD), None)
            return [backward, *_to_all(shape, rank, _like(op, Kind.HEAD_WEIGHT), Payload.NORMALISER, shape.split_head)]
        case _:
            return []


def _forward_feeds(shape: Shape, rank: int, op: Op) -> list[Need]:
    found = [Need(rank, _like(op, Kind.BACKWARD), None)]
    if op.slice < shape.slices - 1:
        found.append(Need(rank, Op(Kind.FORWARD, op.microbatch, op.chunk, op.slice + 1), None))
    if shape.stage(rank, op.chunk) != shape.last_stage:
        after, chunk = (rank + 1, op.chunk) if rank < shape.stages - 1 else (0, op.chunk + 1)
        found.append(_need(rank, after, Op(Kind.FORWARD, op.microbatch, chunk, op.slice), Payload.ACTIVATION))
    elif shape.split_head:
        found += _to_all(shape, rank, _like(op, Kind.HEAD), Payload.HIDDEN, True)
    else:
        found.append(Need(rank, _like(op, Kind.LOSS), None))
    return found


def _backward_feeds(shape: Shape, rank: int, op: Op) -> list[Need]:
    found = [Need(rank, _like(op, Kind.WEIGHT_BACKWARD), None)] if op.kind is Kind.INPUT_BACKWARD else []
    if op.slice:
        found.append(Need(rank, Op(Kind.BACKWARD, op.microbatch, op.chunk, op.slice - 1), None))
    if rank or op.chunk:
        before, chunk = (rank - 1, op.chunk) if rank else (shape.stages - 1, op.chunk - 1)
        return [*found, _need(rank, before, Op(Kind.BACKWARD, op.microbatch, chunk, op.slice), Payload.GRADIENT)]
    return found + _to_all(shape, rank, _like(op, Kind.EMBED_BACKWARD), Payload.ROW_GRADIENT, shape.split_embedding)


def _to_all(shape: Shape, rank: int, op: Op, payload: Payload, split: bool) -> list[Need]:
    return [_need(rank, other, op, payload) for other in range(shape.stages)] if split else []


def _need(here: int, there: int, op: Op, payload: Payload) -> Need:
    return Need(there, op, payload if here != there else None)


def _like(op: Op, kind: Kind) -> Op:
    return Op(kind, op.microbatch, op.chunk, op.slice)


def compute_ops(ops: Iterable[Op]) -> list[Op]:
    """The compute operations among ``ops``, in order."""
    return [op for op in ops if op.kind in COMPUTE]


Node = tuple[int, Op]
"""A rank and one of its operations; as :func:`identity` names it where it is a compute operation."""


def partner(exchange: Op) -> Node:
    """The operation that ``exchange`` shares attention with."""
    assert exchange.partner is not None
    kind = Kind.FORWARD if exchange.kind is Kind.EXCHANGE_FORWARD else Kind.BACKWARD
    return exchange.peer, Op(kind, *exchange.partner)


def couples(schedule: Schedule) -> dict[Node, Node]:
    """Pairs of operations that share attention, both ways round: neither ends before the other has started."""
    found: dict[Node, Node] = {}
    for rank, ops in enumerate(schedule.ranks):
        for op in ops:
            if op.kind in EXCHANGES and op.partner is not None:
                peer, other = partner(op)
                found[rank, _like(op, other.kind)] = peer, other
    return found


def walk(schedule: Schedule) -> list[Node]:
    """All operations in one order in which they may be executed, each rank keeping to its list.

    A compute operation needs what :func:`needs` says, transfers included: sent, and its receive posted. Two that share
    attention both have to be reached. SEND and RECEIVE never wait; RELEASE waits for the RECEIVE of the peer.

    Raises:
        ScheduleError: operations wait for each other in a circle, or for one that is in no list.
    """
    return _Walk(schedule).run()


_Transfer = tuple[Payload | None, int, int, int, int, int]  # payload, source, destination, microbatch, chunk, slice


class _Walk:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.partners = couples(schedule)
        self.reached: set[Node] = set()
        self.done: set[Node] = set()
        self.sent: set[_Transfer] = set()
        self.posted: set[_Transfer] = set()

    def run(self) -> list[Node]:
        ranks = self.schedule.ranks
        at, order, moved = [0] * len(ranks), list[Node](), True
        while moved:
            moved = False
            for rank, ops in enumerate(ranks):
                while at[rank] < len(ops) and not self._awaited(rank, ops[at[rank]]):
                    self._execute(rank, ops[at[rank]])
                    order.append((rank, ops[at[rank]]))
                    at[rank] += 1
                    moved = True
        stuck = [(rank, ops[at[rank]]) for rank, ops in enumerate(ranks) if at[rank] < len(ops)]
        if stuck:
            raise self._stuck(stuck, at)
        return order

    def _awaited(self, rank: int, op: Op) -> str:
        """What ``op`` waits for; empty where it can be executed."""
        if op.kind is Kind.RELEASE:
            return "" if _transfer(op, rank, op.peer) in self.posted else f"the receive of rank {op.peer}"
        if op.kind not in COMPUTE:
            return ""
        for need in needs(self.schedule.shape, rank, op):
            if (need.rank, need.op) not in self.done:
                return f"{need.op} of rank {need.rank}"
            if need.payload is not None and not self._is_transferred(need, rank):
                return f"{need.payload.name.lower()} from rank {need.rank}, which is not sent or not received"
        return self._awaited_partner(rank, op)

    def _awaited_partner(self, rank: int, op: Op) -> str:
        node = (rank, identity(op))
        partner = self.partners.get(node)
        self.reached.add(node)
        return "" if partner is None or partner in self.reached else f"{partner[1]} of rank {partner[0]} to share with"

    def _is_transferred(self, need: Need, rank: int) -> bool:
        transfer = (need.payload, need.rank, rank, need.op.microbatch, need.op.chunk, need.op.slice)
        return transfer in self.sent and transfer in self.posted

    def _execute(self, rank: int, op: Op) -> None:
        if op.kind is Kind.SEND:
            self.sent.add(_transfer(op, rank, op.peer))
        elif op.kind is Kind.RECEIVE:
            self.posted.add(_transfer(op, op.peer, rank))
        elif op.kind in COMPUTE:
            self.done.add((rank, identity(op)))

    def _stuck(self, stuck: list[Node], at: list[int]) -> ScheduleError:
        tales = [
            f"rank {rank} stops at {op} and waits for {self._awaited(rank, op)} (its operation {at[rank]})"
            for rank, op in stuck
        ]
        return ScheduleError("; ".join(tales), where="schedule", fix="build it with build_schedule")


def _transfer(op: Op, source: int, destination: int) -> _Transfer:
    return op.payload, source, destination, op.microbatch, op.chunk, op.slice
