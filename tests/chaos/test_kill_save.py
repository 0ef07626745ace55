"""A save that is killed leaves the former checkpoints or the new one, never nothing and never something else."""

from tests.chaos.forks import isolated
from tests.chaos.kills import crash_at_every_call, kill_at_random


def test_dying_at_any_file_system_call_leaves_the_old_or_the_new():
    """Steps 1, 2, 2 again (replaces), 3 (deletes step 1), 4: what loads never goes back, and ends with 4."""
    found = isolated(crash_at_every_call, [1, 2, 2, 3, 4], 2, timeout_s=120)
    assert len(found) > 40
    assert found == sorted(found)
    assert set(found) == {0, 1, 2, 3, 4}


def test_kills_at_random_moments_lose_nothing_that_was_saved():
    outcomes = isolated(kill_at_random, 1, 60, 1, timeout_s=120)
    assert len(outcomes) == 60
    assert all(loads in (told, told + 1) for told, loads in outcomes), outcomes
    assert outcomes[-1][1] > 20


def test_kills_of_one_of_two_ranks_lose_nothing_that_was_saved():
    outcomes = isolated(kill_at_random, 2, 20, 2, timeout_s=120)
    assert len(outcomes) == 20
    assert all(loads in (told, told + 1) for told, loads in outcomes), outcomes
