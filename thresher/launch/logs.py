"""Where the lines of a rank go.

    rank 0     the terminal as it is, so that a progress bar works; log records also to ``rank-0.log``
    others     ``rank-N.log``; records from warnings upwards also to the terminal, as ``[rank N] ...``

Under torchrun there is no folder, and all ranks write to the terminal, the others from warnings upwards.
"""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TextIO

from thresher.launch.place import Place

START = "=== started "
"""Begins the line that separates the starts of a run in a rank's log."""


class _Terminal(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment: a progress bar puts itself in its place."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self.own = stream

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=self.own or sys.stderr, flush=True)


class _TerminalFormat(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__(f"[rank {rank}] %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).rstrip()
        return text.replace("] ", f"] {record.levelname.lower()}: ", 1) if record.levelno > logging.INFO else text


def log_file(log_dir: Path, rank: int) -> Path:
    """The log of one rank."""
    return log_dir / f"rank-{rank}.log"


def open_logs(place: Place) -> None:
    """Directs output and log records of this process; the first thing a rank does."""
    terminal = _Terminal(_divert(place))
    terminal.setLevel(logging.INFO if place.rank == 0 else logging.WARNING)
    terminal.setFormatter(_TerminalFormat(place.rank))
    # What Python warns of, every rank warns of; once is enough.
    terminal.addFilter(lambda record: place.rank == 0 or record.name != "py.warnings")
    handlers: list[logging.Handler] = [terminal]
    if place.log_dir is not None:
        _mark_start(place, place.log_dir)
        file = logging.FileHandler(log_file(place.log_dir, place.rank), encoding="utf-8")
        file.setFormatter(logging.Formatter(f"%(asctime)s [rank {place.rank}] %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.getLogger("thresher").setLevel(logging.INFO)


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
