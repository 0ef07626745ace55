"""Where the lines of a process go.

    rank 0     the terminal as it is, so that a progress bar works; log records also to ``rank-0.log``
    others     ``rank-N.log``; warnings also to the terminal, as ``[rank N] ...``

The terminal shows what Thresher has to say, and errors of libraries; their warnings stand in the logs alone. Under
torchrun there is no folder of logs, and all ranks write to the terminal.
"""

import logging
import os
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import TextIO

from thresher.launch.place import Place

START = "=== started "
"""Begins the line that separates the starts of a run in a rank's log."""

PACKAGE = "thresher"


class _Terminal(logging.Handler):
    """Writes to ``stream``, or to whatever ``sys.stderr`` is at the moment: a progress bar puts itself in its place."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        super().__init__()
        self.stream = stream
        self.setFormatter(_TerminalFormat(name))
        self.addFilter(lambda record: record.name.split(".")[0] == PACKAGE or record.levelno >= logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=self.stream or sys.stderr, flush=True)


class _TerminalFormat(logging.Formatter):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{self.name}{level}{record.message.rstrip()}"


def log_file(log_dir: Path, rank: int) -> Path:
    """The log of one rank."""
    return log_dir / f"rank-{rank}.log"


def open_command_logs() -> None:
    """Directs the log records of a command that is no rank."""
    _install([_Terminal("")])


def open_logs(place: Place) -> None:
    """Directs output and log records of this rank; the first thing it does."""
    terminal = _Terminal(f"[rank {place.rank}] ", _divert(place))
    if place.rank:
        terminal.setLevel(logging.WARNING)
        # What Python warns of, every rank warns of; once is enough.
        terminal.addFilter(lambda record: record.name != f"{PACKAGE}.warnings")
    handlers: list[logging.Handler] = [terminal]
    if place.log_dir is not None:
        _mark_start(place, place.log_dir)
        file = logging.FileHandler(log_file(place.log_dir, place.rank), encoding="utf-8")
        file.setFormatter(logging.Formatter(f"%(asctime)s [rank {place.rank}] %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    _install(handlers)


def take_over_torch() -> None:
    """Directs the records of torch like all others; torch prints them itself. Call it once torch is imported."""
    logger = logging.getLogger("torch")
    logger.handlers.clear()
    logger.propagate = True


def _install(handlers: list[logging.Handler]) -> None:
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """In place of ``warnings.showwarning``: records under a name that says whose warning it is."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        logging.getLogger(f"{PACKAGE}.warnings").warning("%s", message)
    else:
        logging.getLogger("py.warnings").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)


def _mark_start(place: Place, log_dir: Path) -> None:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with log_file(log_dir, place.rank).open("a", encoding="utf-8") as log:
        log.write(f"{START}{now}, rank {place.rank} of {place.world}, process {os.getpid()}\n")


def _divert(place: Place) -> TextIO | None:
    """Sends standard output and error of ranks other than 0 to their log; returns the terminal they had."""
    if place.log_dir is None or place.rank == 0:
        return None
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    log = os.open(log_file(place.log_dir, place.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, number)
    os.close(log)
    return terminal
