"""The plan of shared attention: symmetric, possible, worth it, and as good as published figures."""

import pytest

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule, plan_exchange
from thresher.pipeline.schedule.ops import Kind, Op, Shape
from thresher.pipeline.schedule.orders import compute_orders
from thresher.pipeline.schedule.validate import validate
from thresher.pipeline.schedule.work import Prices, Work
from thresher.pipeline.simulate.costs import Costs
from thresher.pipeline.simulate.simulator import simulate

FREE = {"transfer": 0.0, "latency": 0.0}
SHAPES = [(2, 1, 2, 4), (4, 1, 2, 8), (2, 2, 2, 4), (4, 2, 3, 10), (3, 1, 1, 5), (8, 2, 2, 16)]
PUBLISHED = {
    (4, 1, 4, 16): {1: 5.4, 3: 7.7, 10: 9.7},
    (8, 4, 4, 16): {1: 4.1, 3: 4.9, 10: 5.6},
    (8, 1, 4, 32): {1: 7.6, 3: 8.7, 10: 9.5},
    (4, 2, 4, 8): {1: 6.2, 3: 8.1, 10: 10.1},
}
"""Percent of bubble with exchange by attention over other work: what the paper's pairing rule reaches in simulation if
peers need not wait for each other (stages, chunks, microbatches, slices)."""


def planned(shape, attention=1.0, tokens=(), **rule):
    shape = Shape(*shape)
    orders = compute_orders(shape)
    return orders, plan_exchange(shape, orders, ExchangeRule(**rule), Prices(shape.slices, Work(attention, tokens)))


def moved(plan):
    return [shared.share for entries in plan for shared in entries.values() if shared.share > 0]


@pytest.mark.parametrize("rule", [{"forced": True}, {"attention": 4.0}, {"attention": 4.0, "limit": 1}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plan_is_symmetric(shape, rule):
    orders, plan = planned(shape, **rule)
    seen = {}
    for rank, entries in enumerate(plan):
        for at, shared in entries.items():
            op = orders[rank][at]
            seen[rank, op.kind, (op.microbatch, op.chunk, op.slice)] = shared
    assert seen
    for (rank, kind, place), shared in seen.items():
        other = seen[shared.peer, kind, shared.partner]
        assert other == (rank, -shared.share, place)
        assert shared.peer != rank
        assert 1 <= abs(shared.share) <= (place if shared.share > 0 else shared.partner)[2]
        assert abs(shared.share) <= rule.get("limit", 99)


@pytest.mark.parametrize("slack", [1, 2])
@pytest.mark.parametrize("shape", [(2, 1, 2, 4), (2, 1, 1, 4), (4, 1, 2, 4), (4, 2, 2, 8), (2, 2, 2, 5)], ids=str)
def test_forced_plan_moves_work_in_both_directions(shape, slack):
    """Also at two ranks, where there is nothing to gain; and both ranks give somewhere, or all but the last."""
    orders, plan = planned((*shape, slack), forced=True)
    kinds = {orders[rank][at].kind for rank, entries in enumerate(plan) for at in entries}
    assert kinds == {Kind.FORWARD, Kind.BACKWARD}
    assert len(moved(plan)) >= shape[3] - 1
    assert all(entries for entries in plan)


def test_half_the_difference_moves():
    """The paper's rule, where attention is all there is."""
    orders, plan = planned((8, 1, 4, 16), attention=1e6, **FREE)
    gaps = [
        (orders[rank][at].slice - shared.partner[2], shared.share)
        for rank, entries in enumerate(plan)
        for at, shared in entries.items()
        if shared.share > 0
    ]
    assert max(gap for gap, _ in gaps) > 6
    assert all(abs(gap / 2 - share) <= 0.5 for gap, share in gaps)


def test_limit_caps_what_moves():
    assert max(moved(planned((8, 1, 4, 32), attention=5.0)[1])) > 4
    assert max(moved(planned((8, 1, 4, 32), attention=5.0, limit=3)[1])) == 3


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((4, 1, 4, 16), {"attention": 0.0}),
        ((4, 1, 4, 16), {"attention": 3.0, "transfer": 5.0}),
        ((4, 1, 4, 16), {"attention": 3.0, "latency": 5.0}),
        ((1, 2, 2, 4), {"attention": 3.0}),
        ((1, 2, 2, 4), {"forced": True}),
        ((1, 1, 2, 1), {"forced": True}),
    ],
    ids=str,
)
def test_off_where_it_does_not_pay(shape, rule):
    assert not any(planned(shape, **rule)[1])


def test_lengths_of_slices_count():
    """Slices that get shorter in proportion to what they attend to are balanced already."""
    lengths, before = [], 0.0
    for _ in range(16):
        length = -before + (before * before + 2.0) ** 0.5  # the same number of pairs in every slice
        lengths.append(length)
        before += length
    even = moved(planned((4, 1, 4, 16), attention=1000.0)[1])
    uneven = moved(planned((4, 1, 4, 16), attention=1000.0, tokens=tuple(lengths))[1])
    assert sum(even) > 100
    assert not uneven


@pytest.mark.parametrize("attention", [1, 3, 10])
@pytest.mark.parametrize("shape", PUBLISHED, ids=str)
def test_bubble_is_no_larger_than_published(shape, attention):
    """Though here peers do wait for each other in every layer."""
    costs = Costs.uniform(shape[3], attention=float(attention))
    rule, work = ExchangeRule(**FREE), costs.work(shape[0])
    shared = 100 * simulate(build_schedule(*shape, exchange=rule, work=work), costs).bubble
    assert shared <= PUBLISHED[shape][attention] + 0.1
    assert shared < 0.7 * 100 * simulate(build_schedule(*shape), costs).bubble


@pytest.mark.parametrize("attention", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("slack", [1, 2])
def test_never_makes_a_step_longer(slack, split, attention):
    costs = Costs.uniform(12, attention=attention)
    settings = {"split_head": split, "split_backward": split, "work": costs.work(4)}
    rules = (None, ExchangeRule(**FREE))
    plain, shared = (simulate(build_schedule(4, 2, 3, 12, slack, exchange=e, **settings), costs) for e in rules)
    assert shared.makespan <= plain.makespan


def test_shares_input_backwards():
    splits = {"split_backward": True, "split_head": True}
    schedule = build_schedule(4, 1, 2, 8, **splits, exchange=ExchangeRule(forced=True), work=Work(1.0))
    validate(schedule)
    pairs = zip(schedule.ranks[0], schedule.ranks[0][1:], strict=False)
    assert any(op.kind is Kind.EXCHANGE_BACKWARD and next_.kind is Kind.INPUT_BACKWARD for op, next_ in pairs)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"limit": -1}, "ScheduleError: exchange: limit is -1. Give 0 or more"),
        ({"transfer": -0.5}, "ScheduleError: exchange: transfer is -0.5. Give 0 or more"),
    ],
)
def test_refuses_rules(rule, message):
    with pytest.raises(ScheduleError) as caught:
        ExchangeRule(**rule)
    assert caught.value.message == message


def test_refuses_lengths_of_another_number_of_slices():
    with pytest.raises(ScheduleError, match=r"work\.tokens: 3 lengths for 4 slices. Give one length per slice"):
        planned((2, 1, 2, 4), tokens=(1, 2, 3))


def test_refuses_other_policies():
    with pytest.raises(ScheduleError, match=r"policy 'seq1f1b' has no exchange. Use policy 'slimpipe'"):
        build_schedule(2, 1, 2, 4, policy="seq1f1b", exchange=ExchangeRule())


def test_refuses_orders_that_wait_in_a_circle():
    ahead, back = Op(Kind.FORWARD, 0, 0, 0), Op(Kind.BACKWARD, 0, 0, 0)
    with pytest.raises(ScheduleError, match=r"in a circle: rank 0 at backward .*; rank 1 at backward"):
        plan_exchange(Shape(2, 1, 1, 1), [[back, ahead], [back, ahead]], ExchangeRule(), Prices(1, Work()))
