"""Training that is killed again and again ends with the very weights of training that is not."""

import pytest

from tests.chaos.forks import isolated
from tests.chaos.training import killed_beside_uninterrupted


def judge(folder: str, seed: int, kills: int, steps: int, timeout_s: float) -> None:
    verdict = isolated(killed_beside_uninterrupted, folder, seed, kills, steps, timeout_s=timeout_s)
    assert verdict.ledger == ()
    assert verdict.identical
    assert verdict.kills == kills
    assert verdict.tensors > 10


def test_four_kills_leave_no_trace(tmp_path):
    judge(str(tmp_path), seed=1, kills=4, steps=28, timeout_s=250)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_leave_no_trace(tmp_path):
    judge(str(tmp_path), seed=2, kills=20, steps=120, timeout_s=850)
