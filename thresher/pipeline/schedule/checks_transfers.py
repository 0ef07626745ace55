"""Checks of the transfers of a schedule: each once on both ends, in time, in one order, and few at once."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from thresher.pipeline.schedule.checks import Index, refused
from thresher.pipeline.schedule.graph import COMPUTE, needs
from thresher.pipeline.schedule.ops import Kind, Op, Payload


class Message(NamedTuple):
    """One transfer, as both ends name it."""

    payload: Payload | None
    source: int
    destination: int
    microbatch: int
    chunk: int
    slice: int


class _Use(NamedTuple):
    """Numbers of the operations that make and consume a message, in the lists of its source and destination."""

    made: int
    used: int


_Ends = dict[Message, int]
"""Number of the operation at one end of each message, in the list of that end."""


def check_transfers(index: Index) -> None:
    """Refuses transfers that are missing, twice there, needed by nobody, too early, too late, or in another order.

    Raises:
        ScheduleError: naming rank and operation.
    """
    uses = dict(_uses(index))
    sent = _ends(index, Kind.SEND, uses, lambda rank, op: _message(op, rank, op.peer))
    received = _ends(index, Kind.RECEIVE, uses, lambda rank, op: _message(op, op.peer, rank))
    released = _ends(index, Kind.RELEASE, uses, lambda rank, op: _message(op, rank, op.peer))
    for message, use in uses.items():
        _check_message(index, message, use, sent.get(message), received.get(message))
    _check_edges(index, uses, sent, received)
    _check_releases(index, sent, released)


def _uses(index: Index) -> Iterable[tuple[Message, _Use]]:
    """All messages that the compute operations need."""
    for rank, at, op in index.of(*COMPUTE):
        for need in needs(index.shape, rank, op):
            if need.payload is not None:
                place = need.op.microbatch, need.op.chunk, need.op.slice
                yield Message(need.payload, need.rank, rank, *place), _Use(index.places[need.rank][need.op], at)


def _message(op: Op, source: int, destination: int) -> Message:
    return Message(op.payload, source, destination, op.microbatch, op.chunk, op.slice)


def _ends(index: Index, kind: Kind, known: Iterable[Message], name: Callable[[int, Op], Message]) -> _Ends:
    known = set(known)
    found: _Ends = {}
    for rank, at, op in index.of(kind):
        message = name(rank, op)
        if message not in known:
            raise refused(rank, at, op, f"rank {message.destination} needs no such message of rank {message.source}")
        if message in found:
            raise refused(rank, at, op, f"it is there already, as operation {found[message]}")
        found[message] = at
    return found


def _check_message(index: Index, message: Message, use: _Use, sent: int | None, received: int | None) -> None:
    payload, source, destination, *_ = message
    maker, user = index.schedule.ranks[source][use.made], index.schedule.ranks[destination][use.used]
    name = payload.name.lower() if payload else ""
    if sent is None:
        raise refused(source, use.made, maker, f"its {name} is not sent to rank {destination}")
    if received is None:
        raise refused(destination, use.used, user, f"the {name} it needs is not received from rank {source}")
    if sent < use.made:
        op = index.schedule.ranks[source][sent]
        raise refused(source, sent, op, f"it comes before what it sends is made, operation {use.made}")
    if received > use.used:
        op = index.schedule.ranks[destination][received]
        raise refused(destination, received, op, f"it comes after what it is for, operation {use.used}")


def _check_edges(index: Index, uses: dict[Message, _Use], sent: _Ends, received: _Ends) -> None:
    """Messages of one payload between two ranks overtake nobody, and few of them wait to be used."""
    edges: defaultdict[tuple[Payload | None, int, int], list[Message]] = defaultdict(list)
    for message in sorted(uses, key=lambda message: received[message]):
        edges[message[:3]].append(message)
    for (_, source, destination), messages in edges.items():
        for first, second in zip(messages, sorted(messages, key=lambda message: sent[message]), strict=True):
            if first != second:
                at = received[first]
                what = f"rank {source} sends microbatch {second.microbatch}, chunk {second.chunk}, slice {second.slice}"
                op = index.schedule.ranks[destination][at]
                raise refused(destination, at, op, f"{what} at that place", "receive in the order of sends")
        _check_waiting(index, destination, [(received[message], uses[message].used) for message in messages])


def _check_waiting(index: Index, rank: int, spans: list[tuple[int, int]]) -> None:
    """At most ``slack`` messages of an edge are between their receive and their use."""
    used = sorted(stop for _, stop in spans)
    for before, (at, _) in enumerate(spans):
        waiting = before + 1 - bisect_right(used, at)
        if waiting > index.shape.slack:
            what = f"{waiting} messages of this edge wait to be used, at most {index.shape.slack} may"
            raise refused(rank, at, index.schedule.ranks[rank][at], what, "receive later")


def _check_releases(index: Index, sent: _Ends, released: _Ends) -> None:
    """What is released has been sent. That the peer's receive never depends on it is seen by walking the schedule."""
    for message, at in released.items():
        if at < sent[message]:
            op = index.schedule.ranks[message.source][at]
            raise refused(message.source, at, op, f"it comes before its send, operation {sent[message]}")
