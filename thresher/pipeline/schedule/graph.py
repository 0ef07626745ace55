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
"""A rank and one of its compute operations, as :func:`identity` names it."""


def couples(schedule: Schedule) -> dict[Node, Node]:
    """Pairs of operations that share attention, both ways round: neither ends before the other has started."""
    found: dict[Node, Node] = {}
    for rank, ops in enumerate(schedule.ranks):
        for op in ops:
            if op.kind in EXCHANGES and op.partner is not None:
                kind = Kind.FORWARD if op.kind is Kind.EXCHANGE_FORWARD else Kind.BACKWARD
                found[rank, _like(op, kind)] = (op.peer, Op(kind, *op.partner))
    return found
