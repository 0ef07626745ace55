"""Predicted bytes: the paper's formula, each kind by itself, and nothing left at the end."""

from dataclasses import replace

import pytest

from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.ops import Kind
from thresher.pipeline.schedule.work import Work
from thresher.pipeline.simulate.costs import TOKENS, Costs, Term, Traffic
from thresher.pipeline.simulate.link import Link
from thresher.pipeline.simulate.memory import Footprint, Holding, predict_memory, slimpipe_bytes
from thresher.pipeline.simulate.simulator import simulate


def _memory(footprint, p, v, m, n, *, costs=None, **options):
    schedule = build_schedule(p, v, m, n, **options)
    costs = costs or Costs.uniform(n)
    timeline = simulate(schedule, costs, Link(latency_s=0.05))
    return predict_memory(timeline, costs, footprint), schedule


@pytest.mark.parametrize("slack", [1, 2])
@pytest.mark.parametrize(("p", "v", "m", "n"), [(2, 1, 2, 4), (4, 2, 2, 8), (4, 2, 5, 10), (8, 3, 2, 16), (1, 2, 2, 4)])
def test_activations_are_those_of_the_formula(p, v, m, n, slack):
    footprint = Footprint(activations=3.0)
    memory, schedule = _memory(footprint, p, v, m, n, slack=slack)
    whole = footprint.microbatch_bytes(TOKENS * n, p * v)
    for rank in range(p):
        assert memory.most(rank, Holding.ACTIVATIONS) == pytest.approx(slimpipe_bytes(whole, schedule.shape, rank))


def test_bytes_do_not_grow_with_microbatches():
    footprint = Footprint(3.0, 1.0, 2.0)
    few, many = (_memory(footprint, 4, 2, m, 8)[0] for m in (2, 8))
    assert [many.peak(r).total for r in range(4)] == [few.peak(r).total for r in range(4)]


def test_pools_are_as_large_as_the_most_slices_of_each_chunk():
    memory, _ = _memory(Footprint(0.0, key_value=1.0), 2, 1, 2, 4)
    # Rank 0 holds at most 4 + 2 slices, rank 1 one microbatch.
    assert [memory.most(rank, Holding.KEYS_VALUES) for rank in (0, 1)] == [6 * TOKENS, 4 * TOKENS]


def test_accumulators_are_of_one_microbatch_but_its_last_slice():
    memory, _ = _memory(Footprint(0.0, accumulators=2.0), 2, 3, 2, 4, costs=replace(Costs.uniform(4), layers=(5,) * 6))
    assert memory.most(1, Holding.ACCUMULATORS) == 3 * 5 * 3 * TOKENS * 2


def test_everything_is_given_back():
    costs = replace(Costs.uniform(8, attention=3), traffic=Traffic(2.0, 1.0, 1.0, 1.0, 1.0), head=Term(1 / TOKENS))
    options = {"split_head": True, "split_embedding": True, "split_backward": True}
    memory, _ = _memory(
        Footprint(3.0, 1.0, 2.0, 5.0, states=7.0, kept_for_weights=0.5),
        *(4, 2, 3, 8),
        costs=costs,
        exchange=ExchangeRule(forced=True),
        work=Work(3.0),
        **options,
    )
    for rank, curve in enumerate(memory.curves):
        assert {kind: held for kind, held in curve[-1].held.items() if held} == {Holding.STATES: 7.0}
        assert min(min(point.held.values()) for point in curve) >= 0
        assert all(memory.most(rank, kind) > 0 for kind in Holding)


def test_logits_are_divided_where_the_output_layer_is_cut():
    footprint = Footprint(0.0, logits=8.0)
    whole, _ = _memory(footprint, 4, 1, 2, 8)
    assert [whole.most(rank, Holding.LOGITS) for rank in (0, 3)] == [0, 8 * TOKENS]
    cut, _ = _memory(footprint, 4, 1, 2, 8, split_head=True)
    live = [cut.most(rank, Holding.LOGITS) / (2 * TOKENS) for rank in range(4)]
    # A part keeps its logits until the loss has come back: some slices at a time, each a quarter as large.
    assert all(1 <= count <= 8 for count in live)


def test_weights_in_the_drain_keep_part_of_the_activations():
    most = [
        _memory(Footprint(1.0, kept_for_weights=share), 4, 1, 1, 4, split_backward=True)[0].most(0, Holding.ACTIVATIONS)
        for share in (0.0, 1.0)
    ]
    assert most == [4 * TOKENS, 4 * TOKENS]
    held = [
        sum(point.held.get(Holding.ACTIVATIONS, 0) for point in memory.curves[0])
        for memory in (
            _memory(Footprint(1.0, kept_for_weights=share), 4, 1, 1, 4, split_backward=True)[0] for share in (0.0, 1.0)
        )
    ]
    assert held[0] < held[1]


def test_receive_buffers_are_bounded_by_the_slack():
    costs = replace(Costs.uniform(8), traffic=Traffic(hidden=1.0))
    for slack in (1, 2):
        memory, _ = _memory(Footprint(0.0), 4, 1, 4, 8, costs=costs, slack=slack)
        # Two directions on ranks in between, each with at most ``slack`` buffers and the one in use.
        assert TOKENS <= memory.most(1, Holding.RECEIVED) <= 2 * (slack + 1) * TOKENS


def test_an_activation_is_taken_over_and_a_gradient_is_kept_while_it_is_used():
    costs = replace(Costs.uniform(4), traffic=Traffic(hidden=1.0))
    timeline = simulate(build_schedule(2, 1, 1, 4, slack=1), costs)
    curves = predict_memory(timeline, costs, Footprint(0.0)).curves
    for rank, kind, least in ((0, Kind.BACKWARD, TOKENS), (1, Kind.FORWARD, 0)):
        event = [event for event in timeline.events[rank] if event.op.kind is kind][-1]
        last = [point for point in curves[rank] if point.time <= event.start][-1]
        assert last.held[Holding.RECEIVED] == least


def test_sends_are_held_until_they_are_released():
    costs = replace(Costs.uniform(8), traffic=Traffic(hidden=1.0))
    memory, schedule = _memory(Footprint(0.0), 4, 1, 4, 8, costs=costs)
    sent = len(schedule.of(1, Kind.SEND))
    assert TOKENS <= memory.most(1, Holding.SENT) < sent * TOKENS / 2


def test_a_helper_holds_more_of_an_exchange_than_a_giver():
    costs = replace(Costs.uniform(8, attention=3), traffic=Traffic(key_value=1.0, query=1.0))
    memory, schedule = _memory(Footprint(0.0), 4, 1, 2, 8, costs=costs, exchange=ExchangeRule(limit=1), work=Work(3.0))
    assert schedule.of(0, Kind.EXCHANGE_FORWARD, Kind.EXCHANGE_BACKWARD)
    # Backward of one slice: keys and values, query, output and its gradient there; gradients of q, K and V back.
    assert max(memory.most(rank, Holding.EXCHANGE) for rank in range(4)) == (4 + 2) * TOKENS
