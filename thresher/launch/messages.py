"""How a command ends: one message and an exit code.

0    done
1    a bug, a rank that was killed or did not answer, a check that failed
2    something the user can mend: configuration, data, plan, checkpoint, command line
128+N  ended by signal N
"""

import sys
import traceback
from pathlib import Path

from rich.console import Console
from rich.text import Text

from thresher.errors import ThresherError
from thresher.launch.failure import Failure, Interrupted, RankFailed
from thresher.launch.logs import START, log_file

FAILED, USER_ERROR, SIGNALLED = 1, 2, 128
TAIL = 20
"""Lines of a rank's log that are shown where it left no report."""


def tell(error: Exception, debug: bool) -> int:
    """Prints what ended a command; returns the exit code.

    Args:
        debug: print the traceback as well where the message would do.

    Raises:
        Exception: ``error`` itself, where it is a bug.
    """
    if isinstance(error, RankFailed):
        return _tell_rank(error, debug)
    if isinstance(error, Interrupted):
        _print(f"Stopped by {error.signal.name}; all ranks have ended")
        return SIGNALLED + error.signal
    if isinstance(error, BrokenPipeError):
        return FAILED
    if isinstance(error, ThresherError):
        message = error.message
    elif isinstance(error, OSError) and error.filename is not None:
        message = f"{type(error).__name__}: {error.filename}: {error.strerror}. Check the path and its permissions"
    else:
        raise error
    if debug:
        _print("".join(traceback.format_exception(error)).rstrip())
    _print(message)
    return USER_ERROR


def _tell_rank(error: RankFailed, debug: bool) -> int:
    failure = error.failure
    _show_cursor()
    if failure.traceback and (debug or failure.kind not in ("user", "stalled")):
        _print(f"[rank {failure.rank}] {failure.traceback.rstrip()}")
    if failure.kind == "user":
        _print(failure.message)
    elif failure.kind == "stalled":
        _print(f"{failure.message}. {_advice(failure, error.log_dir)}")
    else:
        verb = "" if failure.kind in ("killed", "silent") else "failed: "
        _print(f"LaunchError: rank {failure.rank} {verb}{failure.message}. {_advice(failure, error.log_dir)}")
    return USER_ERROR if failure.kind == "user" else FAILED


def _advice(failure: Failure, log_dir: Path) -> str:
    logs = f"The logs of all ranks: {log_dir}"
    if failure.kind == "killed" and "SIGKILL" in failure.message:
        return f"Linux kills processes like this when memory runs out: see 'dmesg', use less of it. {logs}"
    if failure.kind == "lost peer":
        return f"A peer vanished or did not answer within launch.timeout_s. {logs}"
    tail = _tail(log_file(log_dir, failure.rank)) if failure.kind in ("killed", "silent") else ""
    return f"{logs}{tail}"


def _tail(file: Path) -> str:
    """The last lines of a log, to be appended to a message; empty where there are none."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = text.rpartition(START)[2].splitlines()[-TAIL:]
    return "".join(f"\n  {line}" for line in ([f"{file} ends:", *lines] if lines else []))


def _print(message: str) -> None:
    """To standard error; the name of the error in red on a terminal."""
    text = Text(message)
    text.highlight_regex(r"^[A-Z]\w*Error:", "bold red")
    Console(stderr=True).print(text, soft_wrap=True)


def _show_cursor() -> None:
    """A progress bar hides the cursor, and a killed rank does not bring it back."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()
