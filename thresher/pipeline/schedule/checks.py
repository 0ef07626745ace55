"""Checks of the compute operations of a schedule: which there are, where, in which order, and how many are live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.graph import COMPUTE, EXCHANGES, TRANSFERS, identity, needs
from thresher.pipeline.schedule.ops import Kind, Op, Schedule, Shape
from thresher.pipeline.schedule.orders import in_flight


def refused(rank: int, at: int, op: Op, what: str, fix: str = "") -> ScheduleError:
    """The error for operation number ``at`` of the list of ``rank``."""
    return ScheduleError(f"{op}: {what}", where=f"schedule, rank {rank}, operation {at}", fix=fix)


@dataclass(frozen=True)
class Index:
    """A schedule whose compute operations are known to be complete.

    Attributes:
        schedule: all of it.
        places: by rank, compute operation (see :func:`~thresher.pipeline.schedule.graph.identity`) -> number in the
            list.
    """

    schedule: Schedule
    places: Sequence[dict[Op, int]]

    @property
    def shape(self) -> Shape:
        """What the schedule is for."""
        return self.schedule.shape

    def of(self, *kinds: Kind) -> Iterator[tuple[int, int, Op]]:
        """Rank, number and operation of all of ``kinds``."""
        for rank, ops in enumerate(self.schedule.ranks):
            for at, op in enumerate(ops):
                if op.kind in kinds:
                    yield rank, at, op


def check_fields(schedule: Schedule) -> None:
    """Refuses operations with a field out of range, or with fields of another kind of operation."""
    shape = schedule.shape
    if len(schedule.ranks) != shape.stages:
        what = f"{len(schedule.ranks)} lists for {shape.stages} stages"
        raise ScheduleError(what, where="schedule", fix="give one list per rank")
    for rank, ops in enumerate(schedule.ranks):
        for at, op in enumerate(ops):
            fault = _range_fault(shape, op) or _kind_fault(shape, rank, op)
            if fault:
                raise refused(rank, at, op, fault)


def _range_fault(shape: Shape, op: Op) -> str:
    limits = (("microbatch", shape.microbatches), ("chunk", shape.chunks), ("slice", shape.slices))
    for name, limit in limits:
        if not 0 <= getattr(op, name) < limit:
            return f"{name} {getattr(op, name)} is outside 0..{limit - 1}"
    return ""


def _kind_fault(shape: Shape, rank: int, op: Op) -> str:
    moves, shares = op.kind in TRANSFERS, op.kind in EXCHANGES
    if moves != (op.payload is not None):
        return "a transfer needs a payload" if moves else "only transfers have a payload"
    if shares != (op.share != 0) or shares != (op.partner is not None):
        return "an exchange needs a share and a partner" if shares else "only exchanges have a share and a partner"
    if not (moves or shares):
        return "" if op.peer == -1 else "only transfers and exchanges have a peer"
    if not 0 <= op.peer < shape.stages or op.peer == rank:
        return f"peer {op.peer} is no other rank of {shape.stages}"
    return ""


def check_complete(schedule: Schedule) -> Index:
    """Refuses compute operations that are missing, twice there, or of no place in this shape.

    Returns:
        Where each one is.
    """
    places = [_places(schedule.shape, rank, ops) for rank, ops in enumerate(schedule.ranks)]
    for rank, found in enumerate(places):
        for op in _expected(schedule.shape, rank):
            if op not in found:
                what = f"rank {rank} lacks {op}"
                raise ScheduleError(what, where=f"schedule, rank {rank}", fix="every operation has to be there once")
    index = Index(schedule, places)
    _check_split(index)
    return index


def _places(shape: Shape, rank: int, ops: Sequence[Op]) -> dict[Op, int]:
    expected = set(_expected(shape, rank))
    found: dict[Op, int] = {}
    for at, op in enumerate(ops):
        if op.kind not in COMPUTE:
            continue
        if identity(op) not in expected and not (op.kind is Kind.WEIGHT_BACKWARD and shape.split_backward):
            raise refused(rank, at, op, f"rank {rank} has no such operation", _belongs(shape, op))
        if identity(op) in found:
            raise refused(rank, at, op, f"it is there already, as operation {found[identity(op)]}")
        found[identity(op)] = at
    return found


def _belongs(shape: Shape, op: Op) -> str:
    """Where operations like ``op`` are."""
    last = shape.chunks - 1
    match op.kind:
        case Kind.LOSS:
            return f"losses are on rank {shape.stages - 1}, chunk {last}"
        case Kind.HEAD | Kind.HEAD_WEIGHT:
            return f"they are in chunk {last}, and only with split_head"
        case Kind.EMBED | Kind.EMBED_BACKWARD:
            return "they are in chunk 0, and only with split_embedding"
        case _:
            return "it needs split_backward"


def _expected(shape: Shape, rank: int) -> Iterator[Op]:
    """All compute operations of ``rank`` but for the optional split of a backward."""
    last = shape.chunks - 1
    for microbatch in range(shape.microbatches):
        for place in range(shape.slices):
            for chunk in range(shape.chunks):
                yield Op(Kind.FORWARD, microbatch, chunk, place)
                yield Op(Kind.BACKWARD, microbatch, chunk, place)
            if shape.split_embedding:
                yield Op(Kind.EMBED, microbatch, 0, place)
                yield Op(Kind.EMBED_BACKWARD, microbatch, 0, place)
            if shape.split_head:
                yield Op(Kind.HEAD, microbatch, last, place)
                yield Op(Kind.HEAD_WEIGHT, microbatch, last, place)
            if rank == shape.stages - 1:
                yield Op(Kind.LOSS, microbatch, last, place)


def _check_split(index: Index) -> None:
    """Refuses a backward that is split by halves."""
    for rank, at, op in index.of(Kind.INPUT_BACKWARD):
        if not index.shape.split_backward:
            raise refused(rank, at, op, "backwards of this schedule are not split", "set split_backward")
        if Op(Kind.WEIGHT_BACKWARD, op.microbatch, op.chunk, op.slice) not in index.places[rank]:
            raise refused(rank, at, op, "the backward of its weights is missing")
    for rank, at, op in index.of(Kind.WEIGHT_BACKWARD):
        other = index.places[rank][Op(Kind.BACKWARD, op.microbatch, op.chunk, op.slice)]
        if index.schedule.ranks[rank][other].kind is not Kind.INPUT_BACKWARD:
            raise refused(rank, at, op, f"its backward, operation {other}, computes the gradients of weights already")


def check_order(index: Index) -> None:
    """Refuses operations before those of their own rank that they need.

    That is: slices of a microbatch go forward in order and back in reverse, each after its own forward.
    """
    for rank, at, op in index.of(*COMPUTE):
        for need in needs(index.shape, rank, op):
            if need.rank == rank and index.places[rank][need.op] > at:
                raise refused(
                    rank, at, op, f"it needs {need.op}, which comes later, as operation {index.places[rank][need.op]}"
                )


def check_live(index: Index, max_live: int | None) -> None:
    """Refuses more slices between their forward and the end of their backward than a rank may hold.

    Args:
        max_live: that many on every rank; None for what the policy declares.
    """
    for rank, ops in enumerate(index.schedule.ranks):
        bound = in_flight(index.shape, rank) if max_live is None else max_live
        live = 0
        for at, op in enumerate(ops):
            live += op.kind is Kind.FORWARD
            live -= op.kind in (Kind.BACKWARD, Kind.WEIGHT_BACKWARD)
            if live > bound:
                raise refused(rank, at, op, f"{live} slices are live, at most {bound} may be", "go back before")
