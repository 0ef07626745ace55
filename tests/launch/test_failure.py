"""Which of several failures is told."""

import json
from pathlib import Path

import pytest

from thresher.errors import DataError, PipelineStalled
from thresher.launch.failure import Failure, Kind, RankFailed, first, leave_report, of_exception, of_process
from thresher.launch.messages import tell


def failure(rank: int, kind: Kind, time_s: float, message: str = "") -> Failure:
    return Failure(rank, kind, message, "", time_s)


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ([failure(0, "internal", 2.0), failure(1, "internal", 1.0)], 1),
        ([failure(0, "lost peer", 1.0), failure(1, "killed", 2.0, "was killed by SIGKILL")], 1),
        ([failure(0, "lost peer", 1.0), failure(1, "internal", 1.5)], 1),
        ([failure(0, "internal", 1.0), failure(1, "killed", 0.9, "was killed by SIGTERM")], 0),
        ([failure(0, "lost peer", 1.0), failure(1, "killed", 31.0, "was killed by SIGKILL")], 0),
        ([failure(0, "lost peer", 3.0), failure(1, "lost peer", 2.0)], 1),
        ([failure(1, "killed", 2.0, "was killed by SIGTERM")], 1),
        ([failure(0, "stalled", 1.0), failure(1, "killed", 2.0, "was killed by SIGKILL")], 1),
        ([failure(0, "stalled", 1.0), failure(1, "killed", 1.5, "was killed by SIGTERM")], 0),
        ([failure(0, "stalled", 1.9), failure(1, "killed", 6.0, "was killed by SIGKILL")], 0),
    ],
    ids=[
        "earliest",
        "killed",
        "cause",
        "stopped by us",
        "forced by us",
        "only lost peers",
        "only one",
        "waited",
        "too slow",
        "hung",
    ],
)
def test_first_names_the_cause(failures: list[Failure], rank: int) -> None:
    assert first(failures).rank == rank
    assert first(reversed(failures)).rank == rank


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("no file"), "user"),
        (PipelineStalled("no message"), "stalled"),
        (ValueError("a bug"), "internal"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40160"), "lost peer"),
    ],
)
def test_kind_follows_the_exception(error: Exception, kind: str) -> None:
    assert of_exception(3, error).kind == kind


def test_an_error_raised_from_a_broken_collective_is_a_lost_peer() -> None:
    error = ValueError("wrapped")
    error.__cause__ = RuntimeError("gloo: Connection reset")
    assert of_exception(0, error).kind == "lost peer"


def test_a_stalled_pipeline_is_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = PipelineStalled("waited", where="rank 0, forward (microbatch 1, chunk 0, slice 2)", fix="raise the limit")
    assert tell(RankFailed(of_exception(0, error), tmp_path), debug=False) == 1
    told = capsys.readouterr().err
    assert told.startswith("PipelineStalled: rank 0, forward (microbatch 1, chunk 0, slice 2): waited. Raise the limit")
    assert "Traceback" not in told
    assert str(tmp_path) in told


def test_report_comes_back_and_torchrun_can_read_it(tmp_path: Path) -> None:
    left = of_exception(2, DataError("no such file", where="a.parquet", fix="prepare again"))
    leave_report(left, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert of_process(2, 2, 0.0, report) == left
    assert report["message"]["extraInfo"]["py_callstack"] == left.message
    assert report["message"]["extraInfo"]["timestamp"].isdigit()
