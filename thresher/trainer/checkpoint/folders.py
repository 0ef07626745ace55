"""Names on disk, and the moves that a crash may interrupt anywhere.

step-00000123            a checkpoint
step-00000123.partial    one being written; whoever saves next removes it
step-00000123.old        the former checkpoint of a step that is being saved again; valid until the new one is in place
step-00000123.trash      one being deleted
"""

import os
import re
import shutil
from pathlib import Path

_CHECKPOINT = re.compile(r"step-(\d{8,})(\.old)?")


def folder_name(step: int) -> str:
    """The name of the checkpoint folder of ``step``."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint folder's name states; None for anything else."""
    match = _CHECKPOINT.fullmatch(path.name)
    if match is None or folder_name(int(match[1])) != f"step-{match[1]}":
        return None
    return int(match[1])


def candidates(folder: Path) -> list[Path]:
    """Checkpoint folders by name, newest step first, verified or not; empty where ``folder`` does not exist.

    Raises:
        OSError: ``folder`` cannot be listed.
    """
    if not folder.exists():
        return []
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    return sorted(steps, key=lambda path: (-steps[path], path.suffix))


def begin(folder: Path, step: int) -> Path:
    """An empty ``.partial`` folder for ``step``, after tidying what interrupted saves and deletions left.

    Raises:
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("step-*.partial"), *folder.glob("step-*.trash")]:
        shutil.rmtree(path)
    for path in folder.glob("step-*.old"):
        final = path.with_suffix("")
        if final.exists():
            remove(path)
        else:
            path.rename(final)
    partial = folder / f"{folder_name(step)}.partial"
    partial.mkdir()
    return partial


def commit(partial: Path) -> Path:
    """Puts a finished ``.partial`` folder in place; afterwards it survives a power cut.

    Raises:
        OSError: it could not be put in place; the former checkpoint of the step, if any, is where it was.
    """
    final = partial.with_suffix("")
    sync_folder(partial)
    if final.exists():
        _replace(partial, final)
    else:
        partial.rename(final)
    sync_folder(final.parent)
    return final


def _replace(partial: Path, final: Path) -> None:
    old = final.with_suffix(".old")
    final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        old.rename(final)
        raise
    sync_folder(final.parent)
    remove(old)


def remove(path: Path) -> None:
    """Deletes a checkpoint folder; when interrupted, what is left no longer looks like one.

    Raises:
        OSError: it cannot be deleted.
    """
    trash = path.with_suffix(".trash")
    path.rename(trash)
    shutil.rmtree(trash)


def discard(partial: Path) -> None:
    """Removes what a failed save wrote, as far as that is possible: the next :func:`begin` removes the rest."""
    shutil.rmtree(partial, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the entries of a folder are on disk.

    Raises:
        OSError: it cannot be opened or synced.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
