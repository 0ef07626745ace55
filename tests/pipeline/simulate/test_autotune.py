"""The search: what it tries, what it leaves out and why, and what it says when nothing fits."""

from dataclasses import replace

import pytest

from thresher.errors import ScheduleError
from thresher.pipeline.simulate.autotune import (
    NO_EXCHANGE,
    Job,
    Limits,
    Setting,
    autotune,
    exchange_rule,
    predict,
)
from thresher.pipeline.simulate.costs import Costs, Term, Traffic
from thresher.pipeline.simulate.link import Link
from thresher.pipeline.simulate.memory import Footprint

COSTS = Costs(
    (0, 1),
    Term(1e-6, 1e-10, 1e-4),
    Term(2e-6, 2e-10, 2e-4),
    traffic=Traffic(hidden=1024.0, key_value=512.0, query=1024.0),
)
JOB = Job(stages=4, layers=9, microbatches=2, tokens=8192, costs=COSTS, footprint=Footprint(10_000.0, 512.0))
LIMITS = Limits(slice_tokens=512, exchanges=(0,), finalists=2)
PLENTY = 2.0**40


def test_what_fits_is_ranked_by_time():
    choice = autotune(PLENTY, JOB, LIMITS)
    times = [candidate.step_s for candidate in choice.ranked]
    assert times == sorted(times)
    assert choice.best == choice.ranked[0]
    settings = {candidate.setting for candidate in choice.ranked} | {setting for setting, _ in choice.excluded}
    # 9 layers on 4 ranks: 1 or 2 chunks; slices in multiples of 4 of at least 512 tokens.
    assert {(it.chunks, it.slices) for it in settings} == {(v, n) for v in (1, 2) for n in (4, 8, 12, 16)}
    assert len(settings) == 2 * 4 * 2 * 2
    assert {it.slack for it in settings} == {1, 2}
    reasons = {reason for _, reason in choice.excluded}
    assert reasons == {"not among the fastest that fit without exchange"}


def test_a_budget_excludes_what_needs_more():
    sizes = [candidate.peak_bytes for candidate in autotune(PLENTY, JOB, LIMITS).ranked]
    budget = sorted(sizes)[len(sizes) // 3]
    choice = autotune(budget, JOB, LIMITS)
    assert all(candidate.peak_bytes <= budget for candidate in choice.ranked)
    assert any(reason.startswith("needs ") for _, reason in choice.excluded)
    assert choice.best.step_s >= autotune(PLENTY, JOB, LIMITS).best.step_s


def test_nothing_fits():
    with pytest.raises(ScheduleError) as caught:
        autotune(1e6, JOB, LIMITS)
    smallest = predict(JOB, Setting(2, 16, 1, NO_EXCHANGE))
    assert f"the smallest needs {smallest.peak_bytes / 2**20:.4g} MiB: chunks 2, slices 16, slack 1" in str(
        caught.value
    )
    assert "no setting fits into 976.6 KiB" in str(caught.value)
    assert autotune(smallest.peak_bytes, JOB, LIMITS).best.peak_bytes == smallest.peak_bytes


def test_overheads_make_short_slices_lose_and_bubbles_long_ones():
    costly = replace(JOB, costs=replace(COSTS, forward=Term(1e-6, 0, 5e-3), backward=Term(2e-6, 0, 1e-2)))
    free = replace(JOB, layers=8, costs=replace(COSTS, forward=Term(1e-6), backward=Term(2e-6)))
    assert autotune(PLENTY, costly, LIMITS).best.setting.slices == 4
    assert autotune(PLENTY, free, LIMITS).best.setting.slices == 16
    assert autotune(PLENTY, free, LIMITS).best.setting.chunks == 2


def test_exchange_is_chosen_where_attention_is_dear_and_lines_are_fast():
    dear = replace(COSTS, forward=Term(1e-6, 2e-9), backward=Term(2e-6, 4e-9))
    fast = autotune(PLENTY, replace(JOB, costs=dear, layers=4), LIMITS).best
    assert fast.setting.exchange == 0
    slow = autotune(PLENTY, replace(JOB, costs=dear, layers=4, wire=Link(0.05)), LIMITS).best
    assert slow.setting.exchange == NO_EXCHANGE
    off = predict(replace(JOB, costs=dear, layers=4), replace(fast.setting, exchange=NO_EXCHANGE))
    assert fast.step_s < off.step_s


def test_the_rule_of_exchange_follows_from_the_costs():
    costs = replace(COSTS, bounds=(0, 1000, 2000), forward=Term(1e-3, 2e-6), batch=2)
    rule = exchange_rule(costs, 3, Link(0.1, 1e6))
    assert rule.limit == 3
    # One slice: 2 s without attention; all pairs: 2 * 2,001,000 * 2e-6 s over two slices.
    assert costs.work(4).attention == pytest.approx(2_001_000 * 2e-6 / 2)
    assert rule.transfer == pytest.approx(512 * 2000 / 1e6 / 2)
    assert rule.latency == pytest.approx(0.1)
    assert costs.work(4).tokens == (1000, 1000)


def test_large_schedules_are_not_simulated():
    choice = autotune(PLENTY, JOB, replace(LIMITS, operations=200))
    assert any("operations are more than 200" in reason for _, reason in choice.excluded)


def test_one_rank_has_nobody_to_share_with():
    choice = autotune(PLENTY, replace(JOB, stages=1, layers=1, tokens=1024), LIMITS)
    assert {reason for setting, reason in choice.excluded if setting.exchange == 0} <= {
        "one rank has no peer to share with",
        "not among the fastest that fit without exchange",
    }
    assert choice.best.bubble == pytest.approx(0)


def test_too_few_layers():
    with pytest.raises(ScheduleError, match="3 layers are too few for 4 stages"):
        autotune(PLENTY, replace(JOB, layers=3), LIMITS)


def test_too_few_tokens():
    with pytest.raises(ScheduleError, match="1000 tokens are too few for 4 slices of 512"):
        autotune(PLENTY, replace(JOB, tokens=1000), LIMITS)
