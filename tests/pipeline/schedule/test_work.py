"""Costs that placing and sharing go by, and how well schedules fit them where attention dominates."""

from dataclasses import replace

import pytest

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.ops import Kind, Op
from thresher.pipeline.schedule.validate import validate
from thresher.pipeline.schedule.work import Prices, Work
from thresher.pipeline.simulate.costs import TOKENS, Costs, Term
from thresher.pipeline.simulate.simulator import simulate

SETTINGS = [(4, 2, 4, 8, 0.3), (4, 2, 4, 8, 10.0), (4, 1, 2, 16, 3.0), (8, 4, 4, 16, 10.0)]
RULE = ExchangeRule(transfer=0.0, latency=0.0)


def test_prices():
    prices = Prices(2, Work(attention=3.0, tokens=(30, 10), head=0.5))
    # Lengths are 1.5 and 0.5; their pairs, 1.125 and 0.875, make up an attention of 3 each on average.
    expected = {
        Kind.FORWARD: 0.5 + 3 * 0.875,
        Kind.BACKWARD: 2 * (0.5 + 3 * 0.875),
        Kind.INPUT_BACKWARD: 0.5 + 2 * 3 * 0.875,
        Kind.WEIGHT_BACKWARD: 0.5,
        Kind.HEAD: 0.25,
        Kind.HEAD_WEIGHT: 0.25,
    }
    assert {kind: prices.alone(Op(kind, 0, 0, 1)) for kind in expected} == pytest.approx(expected)
    assert prices.alone(Op(Kind.FORWARD, 0, 0, 0)) == pytest.approx(1.5 + 3 * 1.125)
    assert prices.moved(Kind.BACKWARD, 1, 1) == pytest.approx(2 * 3 * 0.5 * 1.5)


def test_ticks_are_whole_and_count_what_is_shared():
    prices = Prices(2, Work(attention=3.0))
    gives = Op(Kind.EXCHANGE_FORWARD, 0, 0, 1, peer=1, share=1, partner=(0, 0, 0))
    helps = Op(Kind.EXCHANGE_FORWARD, 0, 0, 0, peer=0, share=-1, partner=(0, 0, 1))
    late, early = Op(Kind.FORWARD, 0, 0, 1), Op(Kind.FORWARD, 0, 0, 0)
    assert (prices.ticks(late), prices.ticks(early)) == (5500, 2500)
    assert (prices.ticks(late, gives), prices.ticks(early, helps)) == (2500, 5500)
    assert prices.ticks(Op(Kind.LOSS, 0, 0, 0)) == 1
    assert prices.forth_and_back(1) == 3 * 5500


@pytest.mark.parametrize("exchange", [None, RULE], ids=["alone", "shared"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_split_head_hardly_stalls_where_attention_dominates(setting, exchange):
    *shape, attention = setting
    costs = Costs.uniform(shape[3], attention=attention)
    head = Term(0.25 * shape[0] / TOKENS)
    heavy = replace(costs, head=head, head_weight=head)
    plain = build_schedule(*shape, work=costs.work(shape[0]), exchange=exchange)
    split = build_schedule(*shape, work=heavy.work(shape[0]), exchange=exchange, split_head=True)
    validate(split)
    assert simulate(split, heavy).bubble < simulate(plain, costs).bubble + 0.005


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_an_exchange_pays_beside_a_split_head(setting):
    *shape, attention = setting
    costs = Costs.uniform(shape[3], attention=attention)
    work = costs.work(shape[0])
    alone, shared = (build_schedule(*shape, work=work, exchange=rule, split_head=True) for rule in (None, RULE))
    assert any(op.partner for ops in shared.ranks for op in ops)
    assert simulate(shared, costs).makespan < simulate(alone, costs).makespan


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ({"attention": -0.5}, "ScheduleError: work: attention is -0.5. Give 0 or more"),
        ({"head": -1}, "ScheduleError: work: head is -1. Give 0 or more"),
        ({"tokens": (4, 0)}, "ScheduleError: work.tokens: a slice of length 0. Give lengths above 0"),
    ],
)
def test_refuses_work(work, message):
    with pytest.raises(ScheduleError) as caught:
        Work(**work)
    assert caught.value.message == message
