"""Whether a checkpoint folder holds exactly what was written into it."""

import stat
from pathlib import Path

from thresher.errors import CheckpointError
from thresher.trainer.checkpoint.folders import candidates, step_of
from thresher.trainer.checkpoint.hashing import record_of
from thresher.trainer.checkpoint.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from thresher.trainer.checkpoint.ranks import Ranks


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint folder ``path``, each entry naming a file; empty when it is intact.

    Reads every byte. Found are missing, additional, shortened, grown and changed files, a manifest that is not the one
    written, and a folder that bears another step's name.
    """
    manifest, problems = outline(path)
    if manifest is None or problems:
        return problems
    return [problem for name in sorted(manifest.files) for problem in changed(path / name, manifest.files[name])]


def newest_intact(folder: Path) -> Path | None:
    """The checkpoint of the highest step in ``folder`` that is intact; None where there is none. Reads it entirely.

    Raises:
        OSError: ``folder`` cannot be listed.
    """
    return next((path for path in candidates(folder) if not verify(path)), None)


def verify_together(path: Path, ranks: Ranks) -> tuple[Manifest | None, list[str]]:
    """Like :func:`verify`, with the reading shared among ``ranks`` and one verdict for all. Collective."""
    manifest, problems = ranks.first(lambda: outline(path), path)
    if manifest is None or problems:
        return manifest, problems
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].size_bytes, name))
    mine = largest_first[ranks.rank :: ranks.world]
    found = ranks.gather([problem for name in mine for problem in changed(path / name, manifest.files[name])])
    return manifest, sorted(problem for problems in found for problem in problems)


def outline(path: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, if it holds, and what can be found wrong without reading the files: names and lengths."""
    try:
        manifest = read_manifest(path)
        present = {entry.name: entry.lstat() for entry in path.iterdir() if entry.name != MANIFEST}
    except CheckpointError as error:
        return None, [f"{MANIFEST} {error.what}"]
    except OSError as error:
        return None, [f"{path.name} cannot be listed: {error.strerror}"]
    problems = []
    if manifest.step != step_of(path):
        problems.append(f"{MANIFEST} is of step {manifest.step}, the folder is named {path.name}")
    problems += [f"{name} is missing" for name in sorted(manifest.files.keys() - present.keys())]
    problems += [f"{name} does not belong to the checkpoint" for name in sorted(present.keys() - manifest.files.keys())]
    for name in sorted(manifest.files.keys() & present.keys()):
        problems += _misshapen(name, present[name].st_mode, present[name].st_size, manifest.files[name].size_bytes)
    return manifest, problems


def _misshapen(name: str, mode: int, length: int, wanted: int) -> list[str]:
    if not stat.S_ISREG(mode):
        return [f"{name} is not a regular file"]
    return [f"{name} has {length} bytes, not {wanted}"] if length != wanted else []


def changed(file: Path, written: FileRecord) -> list[str]:
    """One entry if the content of ``file`` is not what was written, or cannot be read."""
    try:
        now = record_of(file)
    except OSError as error:
        return [f"{file.name} cannot be read: {error.strerror}"]
    if now.size_bytes != written.size_bytes:
        return [f"{file.name} has {now.size_bytes} bytes, not {written.size_bytes}"]
    return [f"{file.name} has changed content"] if now.xxh3_128 != written.xxh3_128 else []
