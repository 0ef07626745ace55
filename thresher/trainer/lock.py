"""One run at a time in a run directory."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thresher.errors import ConfigError

LOCK = ".lock"

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the run directory ``folder`` until the block ends, or this process does.

    Two runs in one folder would delete each other's checkpoints and mix their records. The kernel holds the lock, so
    that a killed run leaves nothing to clear away; the file says who has it. Where the file system has no locks,
    nobody is kept out, and the log says so.

    Raises:
        ConfigError: another process has the folder, or the file cannot be written.
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=str(path), fix="set run_dir to a folder that can be written"
        ) from None
    try:
        _take(handle, path)
        yield
    finally:
        os.close(handle)


def _take(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
        raise ConfigError(
            f"{holder} trains into this folder at the moment",
            where=str(path.parent),
            fix="wait for it or end it, or set another run_dir (or name)",
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): see to it that no other run uses this folder", path, error.strerror)
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
