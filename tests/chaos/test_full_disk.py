"""A file system that is really full, and what is on disk before a checkpoint counts."""

import ctypes
import os
import re
from pathlib import Path

import pytest

from tests.chaos import small
from tests.chaos.forks import isolated
from thresher.errors import CheckpointError
from thresher.trainer.checkpoint import CheckpointStore

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000


def small_disk(place: Path, size_bytes: int) -> bool:
    """Mounts a tmpfs over ``place``, seen by this process only; whether the system allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS) and libc.unshare(NEW_MOUNTS | NEW_USER):
        return False
    options = f"size={size_bytes}".encode()
    private = libc.mount(b"none", b"/", None, (1 << 18) | (1 << 14), None)
    return not private and not libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, options)


def fill_up(place: str) -> tuple[str, list[str], int]:
    """Saves on a disk with room for two checkpoints and a half, until it is full; then makes room and saves again."""
    folder, size = Path(place), 180_000
    if not small_disk(folder, size):
        return "", [], 0
    store = CheckpointStore(folder, 10)
    message = ""
    for step in range(1, 10):
        try:
            store.save(step, small.state(step), {})
        except CheckpointError as error:
            message = error.message
            break
    left = sorted(path.name for path in folder.iterdir())
    target = small.state(0)
    record = store.restore(target)
    assert record is not None
    assert small.matches(target, record.step)
    for file in (folder / left[0]).iterdir():
        file.unlink()
    assert store.save(20, small.state(20), {}).step == 20
    return message, left, record.step


def test_a_full_disk_is_told_and_the_former_checkpoints_stay(tmp_path):
    message, left, loads = isolated(fill_up, str(tmp_path), timeout_s=60)
    if not left:
        pytest.skip("this system does not let a process mount a file system of its own")
    assert len(left) >= 2
    assert left[-1] == f"step-{loads:08d}"
    assert re.fullmatch(
        r"CheckpointError: .*\.partial.*: rank 0: No space left on device \(the checkpoint needs 43,008 bytes\)\. "
        r"Free space there, or save to a larger file system",
        message,
    )


def test_everything_is_on_disk_before_the_name_appears(tmp_path, monkeypatch):
    """Each file and the folder are synced before the rename, the parent folder after it."""
    happened: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(handle: int) -> None:
        happened.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real_sync(handle)

    def rename(path: Path, target: Path) -> Path:
        happened.append(f"rename {Path(target).name}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    CheckpointStore(tmp_path, 1).save(1, small.state(1), {})
    assert happened == [
        "sync __0_0.distcp",
        "sync .metadata.tmp",
        "rename .metadata",
        "sync MANIFEST.json",
        "sync step-00000001.partial",
        "rename step-00000001",
        f"sync {tmp_path.name}",
    ]
