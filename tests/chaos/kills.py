"""Kills saving processes, at every file-system call and at random moments, and looks at what they leave."""

import os
import random
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.chaos import small
from tests.chaos.forks import ended, forked
from thresher.trainer.checkpoint import CheckpointStore

EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "os.truncate")
"""Audit events of Python's file-system calls. Writing and syncing raise none: they come between two of these."""


def crash_at_every_call(steps: list[int], keep: int) -> list[int]:
    """Saves ``steps`` in a fresh folder again and again, dying at the first, second, ... file-system call.

    Returns:
        for each death the newest step that loads afterwards, 0 for none; its values were compared.
    """
    found: list[int] = []
    while True:
        with tempfile.TemporaryDirectory(prefix="thresher-crash-") as name:
            folder = Path(name)
            status = ended(forked(lambda: _save_until(folder, steps, keep, len(found) + 1)))  # noqa: B023
            if status == 0:
                return found
            assert status == -signal.SIGKILL, status
            found.append(loadable(folder))


def kill_at_random(seed: int, kills: int, ranks: int, keep: int = 2) -> list[tuple[int, int]]:
    """Kills ``ranks`` processes that save one step after the other, ``kills`` times in the same folder.

    Every life goes on after the newest step that loads, and first saves that very step once more.

    Returns:
        for each kill the newest step acknowledged before it and the newest that loads after it.
    """
    rng = random.Random(seed)
    outcomes: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory(prefix="thresher-kill-") as name:
        folder = Path(name, "checkpoints")
        small.save_steps(0, 1, str(folder), [1], keep)
        newest = 1
        while len(outcomes) < kills:
            acknowledged = max(newest, _one_life(rng, folder, Path(name), newest, ranks, keep))
            newest = loadable(folder)
            outcomes.append((acknowledged, newest))
    return outcomes


def loadable(folder: Path) -> int:
    """The step that restores, its values compared with what they must be; 0 where there is no checkpoint."""
    target = small.state(0)
    record = CheckpointStore(folder, 1).restore(target)
    if record is None:
        return 0
    assert small.matches(target, record.step), record
    return record.step


def _save_until(folder: Path, steps: list[int], keep: int, calls: int) -> None:
    left = [calls]

    def count(event: str, arguments: object) -> None:
        if event in EVENTS or event.startswith("shutil."):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    small.save_steps(0, 1, str(folder), steps, keep)


def _one_life(rng: random.Random, folder: Path, scratch: Path, newest: int, ranks: int, keep: int) -> int:
    """Returns the last step that rank 0 was told is saved."""
    rendezvous = scratch / f"store-{rng.getrandbits(64):x}"
    reader, writer = os.pipe()
    children = [
        forked(lambda rank=rank: _save_forever(rank, ranks, folder, rendezvous, newest, keep, writer))  # type: ignore[misc]
        for rank in range(ranks)
    ]
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        stream.read(1)
        start, saves = time.monotonic(), rng.randrange(4)
        told = len(stream.read(saves))
        one_save_s = (time.monotonic() - start) / saves if saves else 0.02
        time.sleep(rng.uniform(0, one_save_s))
        first = rng.randrange(ranks)
        os.kill(children[first], signal.SIGKILL)
        time.sleep(rng.choice([0, 0.01]))
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            ended(child)
        told += len(stream.read())
    return newest + max(0, told - 1)


def _save_forever(rank: int, world: int, folder: Path, rendezvous: Path, newest: int, keep: int, told: int) -> None:
    """Saves ``newest`` again, then the steps after it; one byte when it starts and one for every step saved."""
    if world > 1:
        dist.init_process_group(
            "gloo", f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
    store = CheckpointStore(folder, keep)
    if rank == 0:
        os.write(told, b"s")
    for step in range(newest, newest + 10_000):
        store.save(step, small.state(step, rank, world), {"cursor": step})
        if rank == 0:
            os.write(told, b"k")
