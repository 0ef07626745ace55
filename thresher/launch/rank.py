"""The life of one rank around the work itself: born with logs, gone with its launcher, dead with a report."""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from thresher.errors import LaunchError
from thresher.launch.failure import Failure, leave_report, of_exception
from thresher.launch.logs import log_file, open_logs
from thresher.launch.place import Place, read_place

PR_SET_PDEATHSIG = 1


def live(work: Callable[[Place], None]) -> NoReturn:
    """Runs ``work`` as the rank this process was started as, and ends the process.

    Exit code 0 on success, 2 for a ThresherError, 1 for anything else. The process ends at once: neither threads that
    do not end nor exit handlers nor a process group that waits for dead peers can keep it.
    """
    code = _attempt(work)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _attempt(work: Callable[[Place], None]) -> int:
    place = None
    try:
        place = read_place(os.environ)
        _die_with_launcher(place.launcher)
        open_logs(place)
        faulthandler.enable()
        work(place)
    except BaseException as error:  # CheckpointException of torch and KeyboardInterrupt are no Exceptions
        failure = of_exception(place.rank if place else 0, error)
        _tell(failure, place)
        return 2 if failure.kind == "user" else 1
    return 0


def _die_with_launcher(launcher: int) -> None:
    """Interrupts end this process even while it waits inside a collective; so does the end of its parent (Linux).

    Raises:
        LaunchError: the launcher has ended already, and will not tell.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher and os.getppid() != launcher:
        raise LaunchError(
            f"the launcher, process {launcher}, ended before this rank began",
            where=f"process {os.getpid()}",
            fix="start the run again",
        )


def _tell(failure: Failure, place: Place | None) -> None:
    """Leaves the report for the launcher, then the traceback in the log, or on the terminal where there is no log."""
    if place is not None and place.error_file is not None:
        leave_report(failure, place.error_file)
    if place is not None and place.log_dir is not None:
        with log_file(place.log_dir, place.rank).open("a", encoding="utf-8") as log:
            log.write(failure.traceback)
    else:
        text = failure.traceback if failure.kind == "internal" else failure.message
        print(f"[rank {failure.rank}] {text}", file=sys.stderr)
