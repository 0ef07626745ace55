"""Schedules on the wall clock, with stages that sleep: they need no cores, so bubbles are those of real ranks."""

from dataclasses import replace

import pytest

from benchmarks.pipeline import twin

ATTEMPTS = 4
"""A busy machine only adds to a bubble: one good attempt shows that the schedule allows it."""


@pytest.mark.parametrize("stages", [2, 4])
def test_a_uniform_pipeline_has_the_bubble_of_the_formula(stages):
    case = twin.uniform(stages, quick=False)
    found = []
    for _ in range(ATTEMPTS):
        found.append(twin.run_case(case, steps=1))
        if found[-1].bubble <= 1.15 * case.floor:
            break
    best = min(one.bubble for one in found)
    assert 0.85 * case.floor <= best <= 1.15 * case.floor
    assert found[0].simulated == pytest.approx(case.floor, abs=1e-12)


@pytest.mark.slow
def test_an_exchange_takes_away_half_of_the_imbalance():
    before = twin.run_case(twin.unequal(False, quick=True), steps=2)
    case = twin.unequal(True, quick=True)
    gone = []
    for _ in range(ATTEMPTS):
        gone.append(twin.imbalance_gone(before, twin.run_case(case, steps=2), case.floor))
        if gone[-1] >= 0.5:
            break
    assert max(gone) >= 0.5
    assert before.bubble == pytest.approx(before.simulated, rel=0.3)


def test_a_helper_sleeps_for_what_the_giver_leaves_out():
    case = twin.Case(4, 1, 4, 16, linear_s=1.0, attention=3.0)
    for index, share in ((5, 2), (15, 7)):
        assert case.seconds(index, share) + case.moved(index, share) == pytest.approx(case.seconds(index))
        assert 0 < case.moved(index, share) < case.seconds(index)
    assert replace(case, attention=0.0).moved(15, 7) == 0
    whole = sum(case.linear_s + case.seconds(index) for index in range(16))
    assert whole == pytest.approx(16 * (1 + 3))
