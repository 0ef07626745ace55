"""What a dying rank leaves behind, and which of several failures came first."""

import json
import os
import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from thresher.errors import PipelineStalled, ThresherError

Kind = Literal["user", "internal", "lost peer", "stalled", "killed", "silent"]

MISSES_OTHERS: tuple[Kind, ...] = ("lost peer", "stalled")
"""Kinds of failures that follow from another rank's."""

STOPPED_BY_US_S = 4.0
"""A rank that dies by a signal this long after another's failure was stopped because of that failure: the launcher
kills after five seconds, and counts them in whole ones."""


@dataclass(frozen=True)
class Failure:
    """Why one rank ended.

    Attributes:
        kind: ``user`` (a ThresherError), ``internal`` (any other exception), ``lost peer`` (a collective failed, as
            it does wherever another rank dies), ``stalled`` (the same in a pipeline, which says what it waited for),
            ``killed`` (by a signal), ``silent`` (an exit code without a report).
        message: one line or a few, as the user sees it.
        traceback: empty where there is none.
        time_s: when, in seconds since 1970.
    """

    rank: int
    kind: Kind
    message: str
    traceback: str
    time_s: float


class RankFailed(Exception):
    """A rank ended the run.

    Attributes:
        failure: of the rank that failed first.
        log_dir: folder of the ranks' logs.
    """

    def __init__(self, failure: Failure, log_dir: Path) -> None:
        self.failure, self.log_dir = failure, log_dir
        super().__init__(f"rank {failure.rank}: {failure.message}")


class Interrupted(Exception):
    """A signal ended the run.

    Attributes:
        signal: which one.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.signal = number
        super().__init__(number.name)


def of_exception(rank: int, error: BaseException) -> Failure:
    """The failure that ``error``, which is being handled, means for ``rank``."""
    message = error.message if isinstance(error, ThresherError) else f"{type(error).__name__}: {error}"
    return Failure(rank, _kind(error), message, "".join(traceback.format_exception(error)), time.time())


def _kind(error: BaseException) -> Kind:
    if isinstance(error, PipelineStalled):
        return "stalled"
    return "user" if isinstance(error, ThresherError) else "lost peer" if _is_lost_peer(error) else "internal"


def _is_lost_peer(error: BaseException | None) -> bool:
    """Whether a collective or the store failed under ``error``; torch raises plain RuntimeErrors for gloo."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        text = str(error)
        if "DistError" in names or "gloo" in text or "NCCL" in text or "onnection closed by peer" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def leave_report(failure: Failure, file: Path) -> None:
    """Writes ``failure`` in the form that torch elastic reads and torchrun prints."""
    shown = failure.message if failure.kind == "user" else failure.traceback
    extra = {"py_callstack": shown, "timestamp": str(int(failure.time_s)), "thresher": asdict(failure)}
    text = json.dumps({"message": {"message": failure.message, "extraInfo": extra}})
    # A reader that comes too early must see nothing rather than a half.
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def of_process(rank: int, exit_code: int, time_s: float, report: object) -> Failure:
    """The failure of a process that ended with ``exit_code`` (negative: by that signal).

    Args:
        report: content of its error file; anything else where it left none.
    """
    match report:
        case {"message": {"extraInfo": {"thresher": dict() as fields}}}:
            return Failure(**fields)
    if exit_code < 0:
        return Failure(rank, "killed", f"was killed by {signal.Signals(-exit_code).name}", "", time_s)
    return Failure(rank, "silent", f"ended with exit code {exit_code} and left no report", "", time_s)


def first(failures: Iterable[Failure]) -> Failure:
    """The failure that made the others fail.

    A lost peer, or one that did not answer, is never the cause where another failure is known. A rank killed by
    SIGTERM, or killed at all long after another failed, was stopped by the launcher.
    """
    ordered = sorted(failures, key=lambda f: f.time_s)
    limit = ordered[0].time_s + STOPPED_BY_US_S
    for failure in ordered:
        stopped = failure.kind == "killed" and ("SIGTERM" in failure.message or failure.time_s > limit)
        if failure.kind not in MISSES_OTHERS and not stopped:
            return failure
    return next((f for f in ordered if f.kind in MISSES_OTHERS), ordered[0])
