"""Puts transfers between compute operations so that no rank can wait for another in a circle.

SEND      right after the operation that makes the message. It does not wait.
RECEIVE   some operations before the one that needs the message, at most ``lookahead`` per edge at a time. It does
          not wait either. An edge is (payload, source, destination); its messages are received in the order in
          which they are sent.
RELEASE   waits for a SEND, and with it for the RECEIVE of the peer, so that what was sent can be freed. By the
          clock both are long past: as long as a slice takes forth and back.

All this goes forward on one clock, so nothing waits in a circle, however fast the ranks really are. Messages for which
the lists end too early are waited for at the end of the step, when all ranks have posted everything.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from thresher.pipeline.schedule.clock import Place, start_times
from thresher.pipeline.schedule.graph import MAIN, identity, needs, partner
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Schedule, Shape
from thresher.pipeline.schedule.work import Prices


@dataclass(slots=True)
class _Message:
    """One transfer. Positions are those of compute operations in the lists of source and destination."""

    payload: Payload
    source: int
    destination: int
    op: Op
    made: int
    used: int
    received: int = 0

    def as_op(self, kind: Kind) -> Op:
        """The entry of the list of one end."""
        peer = self.source if kind is Kind.RECEIVE else self.destination
        return Op(kind, self.op.microbatch, self.op.chunk, self.op.slice, self.payload, peer)


def lower(
    shape: Shape,
    lists: Sequence[Sequence[Op]],
    prices: Prices,
    exchanges: Sequence[Mapping[Op, Op]] = (),
    lookahead: int | None = None,
) -> Schedule:
    """The schedule that executes ``lists`` on ranks that share nothing.

    Args:
        shape: of the schedule.
        lists: compute operations by rank, in an order in which nothing waits in a circle.
        prices: what operations cost.
        exchanges: by rank, forwards and backwards (see :func:`~thresher.pipeline.schedule.graph.identity`) -> the
            exchange operation that goes before each.
        lookahead: most receives of one edge that are posted and not yet used; the slack of the shape where None.
    """
    ahead = shape.slack if lookahead is None else lookahead
    shared = exchanges or [{} for _ in lists]
    places = [{identity(op): at for at, op in enumerate(ops)} for ops in lists]
    messages = list(_messages(shape, lists, places))
    _place_receives(lists, messages, ahead)
    before: list[defaultdict[int, list[Op]]] = [defaultdict(list) for _ in lists]
    after: list[defaultdict[int, list[Op]]] = [defaultdict(list) for _ in lists]
    for message in messages:
        after[message.source][message.made].append(message.as_op(Kind.SEND))
        before[message.destination][message.received].append(message.as_op(Kind.RECEIVE))
    ticks = [[prices.ticks(op, own.get(identity(op))) for op in ops] for ops, own in zip(lists, shared, strict=True)]
    for message, at in _releases(ticks, messages, _partners(places, shared), prices):
        before[message.source][at].append(message.as_op(Kind.RELEASE))
    for rank, own in enumerate(shared):
        for op, exchange in own.items():
            before[rank][places[rank][op]].append(exchange)
    return Schedule(shape, tuple(tuple(_merged(ops, *at)) for ops, *at in zip(lists, before, after, strict=True)))


def _merged(ops: Sequence[Op], before: Mapping[int, list[Op]], after: Mapping[int, list[Op]]) -> Iterator[Op]:
    for at, op in enumerate(ops):
        yield from before.get(at, ())
        yield op
        yield from after.get(at, ())


def _messages(shape: Shape, lists: Sequence[Sequence[Op]], places: Sequence[Mapping[Op, int]]) -> Iterator[_Message]:
    """All transfers, by destination and in the order in which they are used."""
    for rank, ops in enumerate(lists):
        for at, op in enumerate(ops):
            for need in needs(shape, rank, op):
                if need.payload is not None:
                    yield _Message(need.payload, need.rank, rank, need.op, places[need.rank][need.op], at)


def _partners(places: Sequence[Mapping[Op, int]], exchanges: Sequence[Mapping[Op, Op]]) -> dict[Place, Place]:
    found = {}
    for rank, shared in enumerate(exchanges):
        for op, exchange in shared.items():
            peer, other = partner(exchange)
            found[rank, places[rank][op]] = peer, places[peer][other]
    return found


def _place_receives(lists: Sequence[Sequence[Op]], messages: Sequence[_Message], ahead: int) -> None:
    """Right after the use of the message ``ahead`` places earlier on its edge, or ``2 * ahead`` forwards and backwards
    before its own use, whichever comes later: buffers of a direction that starts late are not made early.
    """
    mains = [[at for at, op in enumerate(ops) if op.kind in MAIN] for ops in lists]
    edges: defaultdict[tuple[Payload, int, int], list[_Message]] = defaultdict(list)
    for message in messages:
        edge = edges[message.payload, message.source, message.destination]
        edge.append(message)
        freed = edge[-1 - ahead].used + 1 if len(edge) > ahead else 0
        own = mains[message.destination]
        early = bisect_left(own, message.used) - 2 * ahead
        message.received = max(freed, own[early] if early > 0 else 0)


def _releases(
    ticks: Sequence[Sequence[int]], messages: Sequence[_Message], partners: Mapping[Place, Place], prices: Prices
) -> Iterator[tuple[_Message, int]]:
    """Messages with the position before which their source waits for them, in the order in which they are sent.

    Positions past the end of a list are left out.
    """
    waits: defaultdict[Place, list[Place]] = defaultdict(list)
    for message in messages:
        waits[message.destination, message.used].append((message.source, message.made))
    starts = start_times(ticks, waits, partners)
    for message in sorted(messages, key=lambda message: message.made):
        own = starts[message.source]
        sent = own[message.made] + ticks[message.source][message.made]
        margin = prices.forth_and_back(message.op.slice)
        at = bisect_left(own, max(sent, starts[message.destination][message.received]) + margin)
        if at < len(own):
            yield message, at
