"""A folder that appears finished or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thresher.errors import DataError


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """An empty folder ``<out>.partial``, renamed to ``out`` when the block ends without an exception.

    What stood at ``out`` is replaced. After an exception the partial folder stays for inspection; the next call
    empties it. The folder is locked, so that two processes do not write into each other's.

    Raises:
        DataError: another process holds the folder, or it cannot be created.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot be created: {error}", where=str(partial), fix="give a folder you may write") from None
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, partial)
        _clear(partial)
        yield partial
        _replace(partial, out)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, partial: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError("another process writes here", where=str(partial), fix="wait for it, or end it") from None


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _replace(partial: Path, out: Path) -> None:
    old = out.with_name(f"{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
