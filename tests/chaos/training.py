"""Real two-rank training runs that are killed at given steps and started again, with a ledger of every sample."""

import json
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.chaos.forks import ended, forked
from thresher.data.batch import Batch
from thresher.data.prepare import prepare
from thresher.data.recipes.registry import build_recipe
from thresher.settings import parse
from thresher.trainer.checkpoint.folders import folder_name
from thresher.trainer.checkpoint.manifest import read_manifest
from thresher.trainer.run import train
from thresher.trainer.step import Stepper, StepResult
from thresher.trainer.world import World
from thresher.zoo.registry import RunConfig

RANKS, BATCH, ROWS, EVERY = 2, 96, 4000, 5
"""Ranks; samples per step; rows of the data set, 3,200 of them for training; steps between checkpoints."""
DEATH = -signal.SIGKILL


@dataclass(frozen=True)
class Verdict:
    """What came of a killed run beside an uninterrupted one.

    Attributes:
        kills: processes killed, in as many lives.
        identical: whether all final tensors are equal bit by bit.
        tensors: their number.
        ledger: what is wrong with the samples that went into the final weights, none when nothing is.
        seconds: all lives of the killed run.
    """

    kills: int
    identical: bool
    tensors: int
    ledger: tuple[str, ...]
    seconds: float


def killed_beside_uninterrupted(folder: str, seed: int, kills: int, steps: int) -> Verdict:
    """Trains ``steps`` steps once without a disturbance and once with ``kills`` kills at random moments."""
    root, rng = Path(folder), random.Random(seed)
    assert ended(forked(lambda: _prepare(root))) == 0
    assert _live(root, "calm", steps, 0, -1, rng) == [0] * RANKS
    start = time.monotonic()
    deaths = sorted(rng.sample(range(1, steps - 1), kills))
    for life, death in enumerate(deaths):
        assert DEATH in _live(root, "killed", steps, life, death, rng)
    assert _live(root, "killed", steps, kills, -1, rng) == [0] * RANKS
    spent = time.monotonic() - start
    calm, killed = (final_tensors(root / run / "checkpoints" / folder_name(steps)) for run in ("calm", "killed"))
    same = calm.keys() == killed.keys() and all(torch.equal(value, killed[key]) for key, value in calm.items())
    return Verdict(kills, same, len(calm), tuple(_audit(root, steps)), spent)


def final_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, whole."""
    merged = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, merged)
    pending: list[tuple[str, Any]] = [("", torch.load(merged, weights_only=True))]
    found: dict[str, Tensor] = {}
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            found[name] = value
    return found


def _prepare(root: Path) -> None:
    options = {"rows": ROWS, "sparse": 3, "many": 1, "dense": 2, "table_rows": 500, "chunk_rows": 1024}
    prepare(build_recipe("synthetic", options), root / "data")


def _config(root: Path, run: str, steps: int) -> RunConfig:
    """A model with everything that could differ after a resume: dropout, running means, histories, Adam, evaluation."""
    values = {
        "name": run,
        "run_dir": str(root / run),
        "seed": 5,
        "data": {"path": str(root / "data")},
        "model": {"name": "din", "dim": 8, "mlp": {"hidden": [16], "activation": "dice", "dropout": 0.2}},
        "sharding": {"default": "row_wise", "tables": {"sparse_0": "table_wise"}},
        "train": {"batch_size": BATCH, "epochs": 100, "max_steps": steps, "log_every": 10, "clip_norm": 1.0},
        "optim": {"schedule": {"kind": "cosine", "warmup_steps": 5}},
        "eval": {"every_steps": 2 * EVERY + 1, "max_rows": 200},
        "checkpoint": {"every_steps": EVERY, "keep": 2},
        "launch": {"processes": RANKS},
        "tensorboard": False,
    }
    return parse(RunConfig, values, "chaos")


def _live(root: Path, run: str, steps: int, life: int, death: int, rng: random.Random) -> list[int]:
    """One life of all ranks, ended by SIGKILL to one of them shortly after step ``death`` began; -1 lets them live.

    Returns:
        the ranks' exit statuses.
    """
    rendezvous = root / f"store-{run}-{life}"
    reader, writer = os.pipe()
    children = [
        forked(lambda rank=rank: _train(root, run, steps, rank, life, rendezvous, writer))  # type: ignore[misc]
        for rank in range(RANKS)
    ]
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        while (told := stream.read(4)) and (death < 0 or struct.unpack("i", told)[0] < death):
            pass
        if death >= 0:
            time.sleep(rng.uniform(0, 0.04))
            os.kill(children[rng.randrange(RANKS)], signal.SIGKILL)
            time.sleep(rng.choice([0, 0.02]))
            for child in children:
                os.kill(child, signal.SIGKILL)
        return [ended(child) for child in children]


def _train(root: Path, run: str, steps: int, rank: int, life: int, rendezvous: Path, told: int) -> None:
    log = (root / f"log-{run}-{rank}").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    _keep_ledger(root / f"ledger-{run}-{rank}.jsonl", life, told if rank == 0 else -1)
    try:
        train(_config(root, run, steps), World(rank, RANKS, rank, RANKS, torch.device("cpu")))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    dist.destroy_process_group()


def _keep_ledger(path: Path, life: int, told: int) -> None:
    """Has every step of this process written down: life, step, and the rows it consumed by epoch and number."""
    real = Stepper.step

    def recorded(self: Stepper, batches: Sequence[Batch], step: int) -> StepResult:
        if told >= 0:
            os.write(told, struct.pack("i", step))
        rows = [[epoch, index] for batch in batches for epoch, index in zip(*_rows(batch), strict=True)]
        result = real(self, batches, step)
        with path.open("a") as ledger:
            ledger.write(json.dumps([life, step, rows]) + "\n")
        return result

    Stepper.step = recorded  # type: ignore[method-assign]


def _rows(batch: Batch) -> tuple[list[int], list[int]]:
    return batch.epoch.tolist(), batch.index.tolist()


def _audit(root: Path, steps: int) -> list[str]:
    """Compares the ledgers: every step that counts consumed the calm run's rows, each row once an epoch."""
    problems: list[str] = []
    consumed: list[tuple[int, int]] = []
    for rank in range(RANKS):
        calm = _counting(root / f"ledger-calm-{rank}.jsonl")
        killed = _counting(root / f"ledger-killed-{rank}.jsonl")
        if sorted(killed) != list(range(steps)):
            problems.append(f"rank {rank}: steps {sorted(set(range(steps)) ^ set(killed))} are lost or too many")
        problems += [f"rank {rank}: step {step} consumed other rows" for step in killed if killed[step] != calm[step]]
        consumed += [(epoch, index) for rows in killed.values() for epoch, index in rows]
    if len(set(consumed)) != len(consumed):
        problems.append(f"{len(consumed) - len(set(consumed))} rows were repeated within an epoch")
    if len(consumed) != steps * BATCH:
        problems.append(f"{len(consumed)} samples were consumed, not {steps * BATCH}")
    cursor = read_manifest(root / "killed" / "checkpoints" / folder_name(steps)).facts["state"]["cursor"]
    if cursor != steps * BATCH:
        problems.append(f"the cursor is {cursor}, not {steps * BATCH}")
    return problems


def _counting(ledger: Path) -> dict[int, list[list[int]]]:
    """Rows by step, of the last life that did it: what earlier lives did after their last checkpoint is undone."""
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    return {step: rows for _, step, rows in lines}
