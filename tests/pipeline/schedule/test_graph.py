"""Dependencies: spelled out, the same seen from both ends, and walks that end or say where they stop."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings

from tests.pipeline.schedule.shapes import SPLITS, arguments
from thresher.errors import ScheduleError
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.graph import COMPUTE, compute_ops, couples, feeds, identity, needs, walk
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Schedule, Shape

PLAIN, SPLIT = Shape(3, 2, 2, 4), Shape(3, 2, 2, 4, split_embedding=True, split_head=True)


def needed(shape, rank, kind, *place):
    return {
        (need.rank, str(need.op.kind), need.op.chunk, need.op.slice, need.payload and str(need.payload))
        for need in needs(shape, rank, Op(kind, *place))
    }


@pytest.mark.parametrize(
    ("shape", "rank", "op", "expected"),
    [
        (PLAIN, 0, (Kind.FORWARD, 0, 0, 0), set()),
        (PLAIN, 1, (Kind.FORWARD, 0, 1, 2), {(0, "F", 1, 2, "act"), (1, "F", 1, 1, None)}),
        (PLAIN, 0, (Kind.FORWARD, 0, 1, 0), {(2, "F", 0, 0, "act")}),
        (SPLIT, 0, (Kind.FORWARD, 0, 0, 0), {(0, "E", 0, 0, None), (1, "E", 0, 0, "rows"), (2, "E", 0, 0, "rows")}),
        (PLAIN, 2, (Kind.LOSS, 0, 1, 1), {(2, "F", 1, 1, None)}),
        (SPLIT, 2, (Kind.LOSS, 0, 1, 1), {(0, "H", 1, 1, "partial"), (1, "H", 1, 1, "partial"), (2, "H", 1, 1, None)}),
        (SPLIT, 0, (Kind.HEAD, 0, 1, 1), {(2, "F", 1, 1, "hidden")}),
        (SPLIT, 0, (Kind.HEAD_WEIGHT, 0, 1, 1), {(0, "H", 1, 1, None), (2, "L", 1, 1, "norm")}),
        (PLAIN, 2, (Kind.BACKWARD, 0, 1, 3), {(2, "F", 1, 3, None), (2, "L", 1, 3, None)}),
        (PLAIN, 2, (Kind.BACKWARD, 0, 0, 2), {(2, "F", 0, 2, None), (0, "B", 1, 2, "grad"), (2, "B", 0, 3, None)}),
        (PLAIN, 1, (Kind.INPUT_BACKWARD, 0, 0, 3), {(1, "F", 0, 3, None), (2, "B", 0, 3, "grad")}),
        (PLAIN, 1, (Kind.WEIGHT_BACKWARD, 0, 0, 3), {(1, "B", 0, 3, None)}),
        (SPLIT, 1, (Kind.EMBED_BACKWARD, 0, 0, 3), {(1, "E", 0, 3, None), (0, "B", 0, 3, "rowgrad")}),
        (SPLIT, 1, (Kind.EMBED, 0, 0, 3), set()),
        (Shape(1, 2, 1, 2), 0, (Kind.FORWARD, 0, 1, 0), {(0, "F", 0, 0, None)}),
    ],
)
def test_needs(shape, rank, op, expected):
    assert needed(shape, rank, *op) == expected


@settings(max_examples=25)
@given(arguments(stages=4), SPLITS)
def test_both_ends_see_the_same_edges(given, splits):
    schedule = build_schedule(*given, **splits)
    forth, back = Counter(), Counter()
    for rank, ops in enumerate(schedule.ranks):
        for op in compute_ops(ops):
            node = (rank, identity(op))
            forth.update((need[:2], node, need.payload) for need in needs(schedule.shape, rank, op))
            back.update((node, feed[:2], feed.payload) for feed in feeds(schedule.shape, rank, op))
    assert forth == back
    assert set(forth.values()) <= {1}


def test_walk_goes_through_everything_once():
    schedule = build_schedule(4, 2, 3, 10, split_head=True, split_embedding=True, exchange=ExchangeRule(forced=True))
    order = walk(schedule)
    assert [[op for rank, op in order if rank == r] for r in range(4)] == [list(ops) for ops in schedule.ranks]
    ends = {(rank, identity(op)): at for at, (rank, op) in enumerate(order) if op.kind in COMPUTE}
    for rank, op in ends:
        assert all(ends[need[:2]] < ends[rank, op] for need in needs(schedule.shape, rank, op))


def test_couples_are_mutual():
    schedule = build_schedule(4, 1, 2, 8, exchange=ExchangeRule(forced=True))
    pairs = couples(schedule)
    assert pairs
    assert all(pairs[partner] == node for node, partner in pairs.items())
    assert {node[1].kind for node in pairs} == {Kind.FORWARD, Kind.BACKWARD}


def changed(schedule, rank, ops):
    return replace(schedule, ranks=(*schedule.ranks[:rank], tuple(ops), *schedule.ranks[rank + 1 :]))


def without(schedule, rank, wanted):
    return changed(schedule, rank, [op for op in schedule.ranks[rank] if op != wanted])


def stops(schedule, text):
    with pytest.raises(ScheduleError, match=re.escape(text)):
        walk(schedule)


def test_walk_names_what_is_missing():
    schedule = build_schedule(2, 1, 1, 2)
    sent = Op(Kind.SEND, 0, 0, 1, Payload.ACTIVATION, 1)
    received = Op(Kind.RECEIVE, 0, 0, 1, Payload.ACTIVATION, 0)
    stop = "rank 1 stops at forward (microbatch 0, chunk 0, slice 1) and waits for activation from rank 0, which is not"
    stops(without(schedule, 0, sent), stop)
    stops(without(schedule, 1, received), stop)
    stops(
        without(schedule, 0, Op(Kind.FORWARD, 0, 0, 1)),
        "rank 0 stops at backward (microbatch 0, chunk 0, slice 1) and waits for "
        "forward (microbatch 0, chunk 0, slice 1) of rank 0",
    )


def test_walk_stops_at_a_circle_of_releases():
    schedule = build_schedule(2, 1, 1, 2)
    release = Op(Kind.RELEASE, 0, 0, 1, Payload.ACTIVATION, 1)
    first = [op for op in schedule.ranks[0] if op != release]
    at = first.index(Op(Kind.SEND, 0, 0, 1, Payload.ACTIVATION, 1)) + 1
    received = Op(Kind.RECEIVE, 0, 0, 1, Payload.ACTIVATION, 0)
    last = [op for op in schedule.ranks[1] if op != received]
    behind = 1 + next(i for i, op in enumerate(last) if op.kind is Kind.BACKWARD)
    wrong = changed(
        changed(schedule, 0, [*first[:at], release, *first[at:]]), 1, [*last[:behind], received, *last[behind:]]
    )
    stops(
        wrong, "rank 0 stops at release activation (microbatch 0, chunk 0, slice 1, peer 1) and waits for the receive"
    )


def test_walk_stops_where_shared_operations_cross():
    shape = Shape(2, 1, 1, 2)
    shared = [
        [Op(Kind.EXCHANGE_FORWARD, 0, 0, i, peer=1 - rank, share=1 - 2 * rank, partner=(0, 0, 1 - i)) for i in (0, 1)]
        for rank in (0, 1)
    ]
    ranks = [list(ops) for ops in build_schedule(2, 1, 1, 2).ranks]
    for rank, ops in enumerate(ranks):
        for exchange in shared[rank]:
            ops.insert(ops.index(Op(Kind.FORWARD, 0, 0, exchange.slice)), exchange)
    stops(
        Schedule(shape, tuple(map(tuple, ranks))),
        "waits for forward (microbatch 0, chunk 0, slice 1) of rank 1 to share with",
    )
