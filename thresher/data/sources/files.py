"""Finding the files of a data set."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from thresher.errors import DataError, nearest

_LISTED = 20  # names that a message lists at most


def find_file(folder: Path, names: Iterable[str], what: str) -> Path:
    """The first of ``names`` that lies in ``folder``, plain or compressed (``.gz``).

    Args:
        what: what the file is, for the message.

    Raises:
        DataError: there is none, or ``folder`` is no folder; the message lists what is there.
    """
    wanted = list(names)
    if not folder.is_dir():
        raise DataError(f"no such folder, looked there for {what}", where=str(folder), fix="give an existing folder")
    for name in wanted:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    there = [path.name for path in folder.iterdir() if path.is_file()][:_LISTED]
    raise DataError(f"no {what} ({' or '.join(wanted)})", where=str(folder), fix=nearest(wanted[0], there))


def choose_files(source: tuple[Path, ...], patterns: Iterable[str], what: str) -> tuple[Path, ...]:
    """Files given by name, and of given folders those that match the first of ``patterns`` that any matches.

    Files of a folder come in natural order of their names: ``day_2`` before ``day_10``.

    Raises:
        DataError: nothing was given, something given is missing, or a folder has no such file.
    """
    if not source:
        raise DataError(f"no {what} given", where="source", fix="give files or a folder: source=PATH")
    chosen: list[Path] = []
    for path in source:
        if path.is_dir():
            chosen += _matching(path, patterns, what)
        elif path.is_file():
            chosen.append(path)
        else:
            raise DataError("no such file", where=str(path), fix=_nearest(path))
    return tuple(chosen)


def choose_file(source: tuple[Path, ...], patterns: Iterable[str], what: str) -> Path:
    """The one file that ``source`` gives, as in :func:`choose_files`.

    Raises:
        DataError: it gives none, or several.
    """
    first, *others = choose_files(source, patterns, what)
    if others:
        raise DataError(f"several files, {first.name} and {others[0].name}", where="source", fix=f"name one {what}")
    return first


def _matching(folder: Path, patterns: Iterable[str], what: str) -> list[Path]:
    for pattern in patterns:
        if found := [path for path in folder.glob(pattern) if path.is_file()]:
            return sorted(found, key=_natural)
    raise DataError(f"no {what} ({', '.join(patterns)})", where=str(folder), fix="name the files themselves")


def _nearest(path: Path) -> str:
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean '{close[0]}'?" if close else "check the path"


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part or 0), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
