"""How checkpoints and resumed runs withstand faults: damaged files, killed saves, killed training.

``python -m benchmarks.reliability [--quick] [--json PATH]``

Corruptions are tried on three checkpoints of two ranks; the same damaged files are also given to torch DCP alone. Kills
are SIGKILLs of real processes. Costs are those of one rank and one large table, beside DCP alone, interleaved.
"""

import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks import measure
from tests.chaos import small
from tests.chaos.corruption import damage, kinds
from tests.chaos.forks import isolated
from tests.chaos.kills import crash_at_every_call, kill_at_random
from tests.chaos.training import Verdict, killed_beside_uninterrupted
from tests.multi.harness import run_ranks
from thresher.errors import CheckpointError
from thresher.trainer.checkpoint import CheckpointStore
from thresher.trainer.checkpoint.manifest import MANIFEST

NEWEST = 3


@dataclass(frozen=True)
class Corruptions:
    """Damaged checkpoints.

    Attributes:
        silent: of them, loaded as if nothing were.
        unnamed: reported without the name of the damaged file.
        failed: neither loaded nor replaced by the checkpoint before.
        dcp_tried: of them, those that damage files of DCP itself (not the manifest, nor by a new file).
        dcp_silent: of these, loaded by DCP alone with values that are not those saved.
    """

    tried: int
    silent: int
    unnamed: int
    failed: int
    dcp_tried: int
    dcp_silent: int


@dataclass(frozen=True)
class Kills:
    """Killed saves.

    Attributes:
        lost: after how many the newest acknowledged checkpoint, or the next, did not load.
        reached: the step that loads at the end. Without progress kills would hit nothing but the start.
    """

    tried: int
    lost: int
    reached: int


def corruptions(pristine: str, tries: int, seed: int) -> Corruptions:
    """Damages ``tries`` copies of the folder ``pristine``, and restores from each."""
    rng = random.Random(seed)
    silent = unnamed = failed = dcp_tried = dcp_silent = 0
    with tempfile.TemporaryDirectory(prefix="thresher-corrupt-") as scratch:
        for kind in kinds(rng, tries):
            folder = Path(scratch, "copy")
            shutil.copytree(pristine, folder)
            done = damage(rng, folder, kind)
            step, problems = _restored(folder)
            silent += step == NEWEST
            failed += step == 0
            unnamed += not any(name in problem for name in done.files for problem in problems)
            if MANIFEST not in done.files and done.kind not in ("extra", "duplicated"):
                dcp_tried += 1
                dcp_silent += _dcp_alone_is_wrong(done.checkpoint)
            shutil.rmtree(folder)
    return Corruptions(tries, silent, unnamed, failed, dcp_tried, dcp_silent)


def _restored(folder: Path) -> tuple[int, list[str]]:
    """The step whose values were loaded, 0 for none, and what was reported."""
    target = small.state(0)
    try:
        record = CheckpointStore(folder, 1).restore(target)
    except CheckpointError as error:
        return 0, [error.message]
    if record is None or not small.matches(target, record.step):
        return 0, []
    return record.step, [problem for bad in record.skipped for problem in bad.problems]


def _dcp_alone_is_wrong(checkpoint: Path) -> bool:
    target = small.state(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_load(target, storage_reader=FileSystemReader(checkpoint))
    except BaseException as error:  # DCP's own exception derives from it
        if isinstance(error, KeyboardInterrupt):
            raise
        return False
    return not small.matches(target, NEWEST)


def killed_saves(kills: int, ranks: int, seed: int) -> Kills:
    """Kills processes that save without a pause, at random moments."""
    outcomes = isolated(kill_at_random, seed, kills, ranks, timeout_s=60 + 2.0 * kills * ranks)
    return Kills(len(outcomes), sum(loads not in (told, told + 1) for told, loads in outcomes), outcomes[-1][1])


def crash_points() -> Kills:
    """Dies at each file-system call of five saves; what loads afterwards must never go back."""
    found = isolated(crash_at_every_call, [1, 2, 2, 3, 4], 2, timeout_s=300)
    return Kills(len(found), sum(later < earlier for earlier, later in pairwise(found)), found[-1])


def resumed(kills: int, steps: int, seed: int) -> Verdict:
    """Kills a two-rank training run again and again."""
    with tempfile.TemporaryDirectory(prefix="thresher-resume-") as folder:
        return isolated(killed_beside_uninterrupted, folder, seed, kills, steps, timeout_s=120 + 60.0 * kills)


def costs(table_bytes: int, repetitions: int) -> dict[str, float]:
    """Seconds to save and restore one table, and the ratios to DCP alone."""
    state = {"model": {"table": torch.rand(table_bytes // 256, 64)}}
    with tempfile.TemporaryDirectory(prefix="thresher-cost-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, plain = CheckpointStore(Path(folder, "ours"), 1), Path(folder, "plain")
        numbers = count(1)
        work: dict[str, Callable[[], object]] = {
            "save": lambda: ours.save(next(numbers), state, {}),
            "dcp_save": lambda: _dcp_save(state, plain),
            "restore": lambda: ours.restore(state),
            "dcp_restore": lambda: dcp_load(state, storage_reader=FileSystemReader(plain / "new")),
        }
        times = measure.interleaved(work, repetitions, clock=measure.wall)
    return {
        "table_bytes": float(table_bytes),
        "save_s": times["save"].median_s,
        "restore_s": times["restore"].median_s,
        "save_times_dcp": measure.ratio(times["dcp_save"], times["save"]),
        "restore_times_dcp": measure.ratio(times["dcp_restore"], times["restore"]),
    }


def _dcp_save(state: dict[str, Any], folder: Path) -> None:
    """Into a new folder, then deletes the former one: as much work for the disk as a save that keeps one."""
    new, old = folder / "new", folder / "old"
    if new.exists():
        new.rename(old)
    dcp_save(state, storage_writer=FileSystemWriter(new))
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Measures and reports."""
    chosen = measure.options(measure.parser("reliability: faults survived").parse_args())
    quick = chosen.quick
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # DCP and the store tell of every damage
    with tempfile.TemporaryDirectory(prefix="thresher-pristine-") as folder:
        run_ranks(2, small.save_steps, folder, [1, 2, NEWEST], 5, timeout_s=120)
        damaged = corruptions(folder, 200 if quick else 1000, seed=1)
    one = killed_saves(60 if quick else 1000, 1, seed=2)
    two = killed_saves(20 if quick else 200, 2, seed=3)
    points = crash_points()
    training = resumed(*((4, 28) if quick else (20, 120)), seed=4)
    cost = costs(1 << (26 if quick else 28), 3 if quick else 5)
    results: dict[str, Any] = {
        "corruptions": asdict(damaged),
        "killed_saves": asdict(one),
        "killed_saves_two_ranks": asdict(two),
        "crash_points": asdict(points),
        "resume": {**asdict(training), "identical": int(training.identical), "ledger_problems": len(training.ledger)},
        "cost": cost,
    }
    rows: list[list[object]] = [
        ["corruptions loaded silently", damaged.tried, damaged.silent],
        ["corruptions whose file is not named", damaged.tried, damaged.unnamed],
        ["corruptions without a fallback", damaged.tried, damaged.failed],
        ["those of DCP's files, loaded silently by DCP alone", damaged.dcp_tried, damaged.dcp_silent],
        ["saves killed at a random moment, checkpoints lost", one.tried, one.lost],
        ["the same with two ranks", two.tried, two.lost],
        ["saves killed at each file-system call, checkpoints lost", points.tried, points.lost],
        ["training killed; final tensors that differ", training.kills, 0 if training.identical else training.tensors],
        ["training killed; samples lost or repeated", training.kills, len(training.ledger)],
        [
            f"save {cost['table_bytes'] / 2**20:.0f} MiB: seconds, times DCP alone",
            cost["save_s"],
            cost["save_times_dcp"],
        ],
        ["restore it: seconds, times DCP alone", cost["restore_s"], cost["restore_times_dcp"]],
    ]
    measure.report("Reliability", ["fault", "tried", "bad"], rows, results, chosen)


if __name__ == "__main__":
    main()
