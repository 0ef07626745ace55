"""Checks of shared attention: both ranks plan the same, for operations that can be shared."""

from thresher.pipeline.schedule.checks import Index, refused
from thresher.pipeline.schedule.graph import EXCHANGES
from thresher.pipeline.schedule.ops import Kind, Op

_SHARED = {
    Kind.EXCHANGE_FORWARD: (Kind.FORWARD,),
    Kind.EXCHANGE_BACKWARD: (Kind.BACKWARD, Kind.INPUT_BACKWARD),
}

_Key = tuple[int, Kind, tuple[int, int, int]]  # rank, kind, what is shared


def check_exchanges(index: Index) -> None:
    """Refuses exchanges that are not directly before their operation, of too many slices, or without counterpart.

    Raises:
        ScheduleError: naming rank and operation.
    """
    found: dict[_Key, tuple[int, Op]] = {}
    for rank, at, op in index.of(*EXCHANGES):
        if index.shape.policy != "slimpipe":
            raise refused(rank, at, op, f"policy '{index.shape.policy}' has no exchange")
        _check_place(index, rank, at, op)
        found[rank, op.kind, _place(op)] = at, op
    for (rank, _, _), (at, op) in found.items():
        _check_counterpart(rank, at, op, found)


def _place(op: Op) -> tuple[int, int, int]:
    return op.microbatch, op.chunk, op.slice


def _check_place(index: Index, rank: int, at: int, op: Op) -> None:
    following = index.schedule.ranks[rank][at + 1 : at + 2]
    if not following or following[0].kind not in _SHARED[op.kind] or _place(following[0]) != _place(op):
        shared = _SHARED[op.kind][0].name.lower()
        raise refused(rank, at, op, f"the next operation is {(*following, 'none')[0]}", f"put it before its {shared}")
    giver = op.slice if op.share > 0 else op.partner[2] if op.partner else 0
    if abs(op.share) > giver:
        raise refused(rank, at, op, f"{abs(op.share)} slices move, but only {giver} come before the giver's")


def _check_counterpart(rank: int, at: int, op: Op, found: dict[_Key, tuple[int, Op]]) -> None:
    other = found.get((op.peer, op.kind, op.partner or (-1, -1, -1)))
    if other is None:
        raise refused(rank, at, op, f"rank {op.peer} does not share its operation {op.partner}")
    number, counterpart = other
    expected = (rank, -op.share, _place(op))
    given = (counterpart.peer, counterpart.share, counterpart.partner)
    if given != expected:
        what = f"its counterpart, operation {number} of rank {op.peer}, has (peer, share, partner) {given}"
        raise refused(rank, at, op, what, f"it should have {expected}")
