"""Transfers: each once, in order, in time, few at a time, and no rank waits for ever."""

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pipeline.schedule.execution import execute
from tests.pipeline.schedule.shapes import SPLITS, WORKS, arguments
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.clock import start_times
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.graph import COMPUTE, compute_ops, needs
from thresher.pipeline.schedule.lower import lower
from thresher.pipeline.schedule.ops import Kind, Op, Payload
from thresher.pipeline.schedule.orders import group_size
from thresher.pipeline.schedule.work import Prices, Work


def message(rank, op):
    """What a transfer is about, the same at both ends."""
    ends = (op.peer, rank) if op.kind is Kind.RECEIVE else (rank, op.peer)
    return (op.payload, *ends, op.microbatch, op.chunk, op.slice)


def transfers(schedule, kind):
    return [message(rank, op) for rank, ops in enumerate(schedule.ranks) for op in ops if op.kind is kind]


def words(schedule):
    """Lists in which transfers have their payload."""
    return [" ".join(f"{op.kind}{op.payload or ''}{op.slice}" for op in ops) for ops in schedule.ranks]


def test_two_stages_two_slices():
    assert words(build_schedule(2, 1, 1, 2)) == [
        "Rgrad1 Rgrad0 F0 Sact0 F1 Sact1 Dact0 Dact1 B1 B0",
        "Ract0 Ract1 F0 L0 F1 L1 B1 Sgrad1 B0 Sgrad0",
    ]


def test_one_stage_sends_nothing():
    schedule = build_schedule(1, 3, 2, 2, split_head=True, split_embedding=True)
    assert all(op.kind in COMPUTE for op in schedule.ranks[0])


@settings(max_examples=40)
@given(arguments(), SPLITS, st.booleans(), WORKS)
def test_nothing_hangs(given, splits, shared, work):
    exchange = ExchangeRule(forced=True) if shared and given[-1] == "slimpipe" else None
    # The execution is a network of processes that only wait for given messages: one order of execution that ends
    # proves that all do.
    execute(build_schedule(*given, **splits, exchange=exchange, work=work))


@settings(max_examples=40)
@given(arguments(), SPLITS)
def test_transfers(given, splits):
    schedule = build_schedule(*given, **splits)
    shape = schedule.shape
    sent, received, released = (transfers(schedule, kind) for kind in (Kind.SEND, Kind.RECEIVE, Kind.RELEASE))
    wanted = [
        (need.payload, need.rank, rank, need.op.microbatch, need.op.chunk, need.op.slice)
        for rank, ops in enumerate(schedule.ranks)
        for op in compute_ops(ops)
        for need in needs(shape, rank, op)
        if need.payload
    ]
    assert Counter(sent) == Counter(received) == Counter(wanted)
    assert set(Counter(sent).values()) <= {1}
    assert set(Counter(released).values()) <= {1}
    assert set(released) <= set(sent)
    assert by_edge(sent) == by_edge(received)


def by_edge(messages):
    edges = defaultdict(list)
    for each in messages:
        edges[each[:3]].append(each[3:])
    return edges


@settings(max_examples=20)
@given(arguments(), SPLITS, WORKS)
def test_little_is_held(given, splits, work):
    schedule = build_schedule(*given, **splits, work=work)
    slack = schedule.shape.slack
    most = bound(schedule.shape) + (2 if work.attention else 0)  # late slices take longer until they are received
    for rank, ops in enumerate(schedule.ranks):
        waiting, held = Counter(), Counter()
        for op in ops:
            edge = (op.payload, op.peer)
            if op.kind is Kind.RECEIVE:
                waiting[edge] += 1
                assert waiting[edge] <= slack
            elif op.kind is Kind.SEND:
                held[edge] += 1
            elif op.kind is Kind.RELEASE:
                held[edge] -= 1
                assert held[edge] >= 0
            elif op.kind in COMPUTE:
                waiting.subtract((need.payload, need.rank) for need in needs(schedule.shape, rank, op) if need.payload)
            assert max(held.values(), default=0) <= most


def bound(shape):
    """Messages of one edge on their way: a few, and those by which a chunk is ahead that more than p slices visit."""
    visit = shape.microbatches // max(1, shape.microbatches // shape.stages)
    if shape.policy == "slimpipe":
        visit = group_size(shape)
    if shape.policy in ("gpipe", "terapipe"):  # the first rank may be done before the last one is half way through
        visit = shape.microbatches * shape.slices
    return max(shape.stages, visit - shape.stages) + 7  # rows go ahead by p


def test_lookahead_bounds_receives():
    compute = [compute_ops(ops) for ops in build_schedule(2, 1, 1, 8).ranks]
    shape = build_schedule(2, 1, 1, 8).shape
    for lookahead in (1, 3):
        lowered = lower(shape, compute, Prices(shape.slices, Work()), lookahead=lookahead)
        received = words(lowered)[1].split("F0")[0].split()
        assert received == [f"Ract{i}" for i in range(lookahead)]


def test_receives_of_gradients_are_not_posted_at_the_start():
    ops = build_schedule(2, 1, 2, 16).ranks[0]
    first = next(at for at, op in enumerate(ops) if op.kind is Kind.RECEIVE and op.payload is Payload.GRADIENT)
    backward = next(at for at, op in enumerate(ops) if op.kind is Kind.BACKWARD)
    assert len([op for op in ops[first:backward] if op.kind is Kind.FORWARD]) == 4


def test_exchange_is_right_before_its_operation():
    schedule = build_schedule(4, 2, 2, 8, exchange=ExchangeRule(forced=True))
    shared = 0
    for ops in schedule.ranks:
        for op, following in pairwise(ops):
            if op.partner:
                kind = Kind.FORWARD if op.kind is Kind.EXCHANGE_FORWARD else Kind.BACKWARD
                assert following == Op(kind, op.microbatch, op.chunk, op.slice)
                shared += 1
    assert shared > 20


def test_start_times():
    ticks = [[3, 5], [3, 5]]
    assert start_times(ticks, {(1, 0): [(0, 0)], (0, 1): [(1, 1)]}, {}) == [[0, 11], [3, 6]]
    assert start_times(ticks, {(1, 0): [(0, 0)]}, {(0, 1): (1, 1), (1, 1): (0, 1)}) == [[0, 6], [3, 6]]
    with pytest.raises(AssertionError, match="circle"):
        start_times(ticks, {(0, 0): [(1, 1)], (1, 0): [(0, 0)]}, {})
