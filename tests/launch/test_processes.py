"""Ranks that raise, are killed, hang: what the launcher says, and that it leaves nothing running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from thresher.launch.failure import RankFailed
from thresher.launch.processes import run_ranks

DEADLINE_S = 90


def start(mode: str, log_dir: Path) -> None:
    run_ranks(["-m", "tests.launch.ranks", mode, str(log_dir)], 2, log_dir, 1)


def failure_of(mode: str, log_dir: Path) -> RankFailed:
    with pytest.raises(RankFailed) as caught:
        start(mode, log_dir)
    return caught.value


def test_user_error_of_one_rank_is_told_and_not_the_lost_connections_of_others(tmp_path: Path) -> None:
    failure = failure_of("user error", tmp_path).failure
    assert (failure.rank, failure.kind) == (1, "user")
    assert failure.message.startswith("DataError: train/part-00000.parquet: no such column 'price'. Prepare")


def test_traceback_of_the_first_failing_rank_is_kept(tmp_path: Path) -> None:
    failure = failure_of("bug", tmp_path).failure
    assert (failure.rank, failure.kind) == (1, "internal")
    assert 'ZeroDivisionError("the planted bug")' in failure.traceback
    assert "the planted bug" in (tmp_path / "rank-1.log").read_text()


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("killed", "killed", "was killed by SIGKILL"),
        ("crashed", "killed", "was killed by SIGSEGV"),
        ("exit code", "silent", "ended with exit code 7 and left no report"),
    ],
)
def test_death_without_a_report_is_blamed_on_the_rank_that_died(
    tmp_path: Path, mode: str, kind: str, message: str
) -> None:
    failure = failure_of(mode, tmp_path).failure
    assert (failure.rank, failure.kind, failure.message) == (1, kind, message)


def test_rank_that_would_hang_at_exit_ends(tmp_path: Path) -> None:
    start_s = time.monotonic()
    start("hangs at exit", tmp_path)
    assert time.monotonic() - start_s < 60


def test_streams_and_records_go_where_they_should(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start("quiet", tmp_path)
    terminal = capfd.readouterr()
    logs = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert "a print of rank 0" in terminal.out
    assert "a print of rank 1" in logs[1]
    assert "rank 1" not in terminal.out
    assert "[rank 0] an info of rank 0" in terminal.err
    assert "[rank 1] warning: a warning of rank 1" in terminal.err
    assert "an info of rank 1" not in terminal.err
    assert terminal.err.count("warning: a note of ours") == 1
    assert terminal.err.count("error: a library's error") == 2
    for text in ("a library's warning", "a library's record"):
        assert text not in terminal.err
        assert all(text in log for log in logs)
    assert "[rank 0] INFO thresher.test: an info of rank 0" in logs[0]
    assert "[rank 1] INFO thresher.test: an info of rank 1" in logs[1]


def test_dollar_signs_of_overrides_arrive_unchanged(tmp_path: Path) -> None:
    run_ranks(["-c", "import sys; assert sys.argv[1] == '${local_rank} $$x'", "${local_rank} $$x"], 1, tmp_path, 1)


def test_rank_zero_keeps_the_terminal(tmp_path: Path) -> None:
    program = f"from tests.launch.test_processes import start, Path; start('terminal', Path({str(tmp_path)!r}))"
    master, slave = os.openpty()
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave)
    os.close(slave)
    assert launcher.wait(DEADLINE_S) == 0
    assert b"rank 0 has a terminal: True" in os.read(master, 10_000)
    os.close(master)
    assert "rank 1 has a terminal: False" in (tmp_path / "rank-1.log").read_text()


@contextmanager
def sleeping_ranks(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launcher whose two ranks sleep; yields it and the ranks' process ids, and kills all of them at the end."""
    program = (
        "import sys; from pathlib import Path; from thresher.launch.messages import tell\n"
        "from tests.launch.test_processes import start\n"
        f"try: start('sleeps', Path({str(folder)!r}))\n"
        "except Exception as error: sys.exit(tell(error, False))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    files = [folder / f"pid-{rank}" for rank in range(2)]
    pids: list[int] = []
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        pids = [int(file.read_text()) for file in files]
        yield launcher, pids
    finally:
        for pid in [launcher.pid, *pids]:
            with_signal(pid, signal.SIGKILL)
        launcher.communicate(timeout=DEADLINE_S)


def with_signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_launcher_ends_all_ranks_quickly(tmp_path: Path, number: signal.Signals) -> None:
    with sleeping_ranks(tmp_path) as (launcher, pids):
        launcher.send_signal(number)
        _, told = launcher.communicate(timeout=10)
        assert launcher.returncode == 128 + number
        assert told == f"Stopped by {number.name}; all ranks have ended\n"
        assert gone(pids, within_s=1)


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    with sleeping_ranks(tmp_path) as (launcher, pids):
        launcher.kill()
        assert gone(pids, within_s=5)


def test_a_rank_whose_launcher_died_before_it_began_ends_at_once(tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "THRESHER_LAUNCHER": "1"}
    command = [sys.executable, "-m", "tests.launch.ranks", "sleeps", str(tmp_path)]
    ended = subprocess.run(command, env=os.environ | place, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 2
    assert "the launcher, process 1, ended before this rank began. Start the run again" in ended.stderr


def test_one_killed_rank_ends_the_others(tmp_path: Path) -> None:
    with sleeping_ranks(tmp_path) as (launcher, pids):
        os.kill(pids[1], signal.SIGKILL)
        _, told = launcher.communicate(timeout=20)
        assert launcher.returncode == 1
        assert told.startswith("LaunchError: rank 1 was killed by SIGKILL.")
        assert gone(pids, within_s=1)
