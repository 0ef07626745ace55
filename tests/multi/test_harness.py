"""The harness itself: results by rank, failures with the rank named, hangs ended at the deadline."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.multi.harness import RankDied, RanksHung, run_ranks
from thresher.errors import PlanError


def add_up(rank: int, world: int, base: int) -> tuple[int, int, str]:
    total = torch.tensor([base + rank])
    dist.all_reduce(total)
    return rank, int(total), os.environ["LOCAL_WORLD_SIZE"]


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise PlanError("no room", where="table 't'")
    dist.barrier()


def die_on_one(rank: int, world: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_one(rank: int, world: int, folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def return_unpicklable(rank: int, world: int) -> object:
    return lambda: rank


def test_results_come_by_rank_and_ranks_know_their_machine() -> None:
    assert run_ranks(2, add_up, 10, timeout_s=60, local_world=1) == [(0, 21, "1"), (1, 21, "1")]


def test_a_failure_is_raised_again_with_its_rank_and_traceback() -> None:
    with pytest.raises(PlanError) as caught:
        run_ranks(2, fail_on_one, timeout_s=60)
    assert "on rank 1 of 2" in caught.value.__notes__[0]
    assert "fail_on_one" in caught.value.__notes__[0]


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankDied, match="rank 1 ended without a result, exit code -9"):
        run_ranks(2, die_on_one, timeout_s=60)


def test_a_hang_ends_at_the_deadline_with_stacks_and_no_process_left(tmp_path: Path) -> None:
    with pytest.raises(RanksHung, match="hang_on_one"):
        run_ranks(2, hang_on_one, str(tmp_path), timeout_s=8)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}/status").exists() and "zombie" not in _state(pid) for pid in pids)


def test_an_answer_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="cannot send the rank's answer"):
        run_ranks(1, return_unpicklable, timeout_s=60)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text().split("State:")[1].split("\n")[0]
