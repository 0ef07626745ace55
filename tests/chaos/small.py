"""A small two-rank checkpoint with sharded tensors, without a model: what faults are tried on."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard

from thresher.trainer.checkpoint import CheckpointStore

ROWS, DIM = 512, 16


def values(step: int) -> dict[str, Tensor]:
    """The tensors that belong to ``step``; any two steps differ in every element."""
    table = torch.arange(ROWS * DIM, dtype=torch.float32).view(ROWS, DIM) + step * 1_000_003
    return {"table": table, "dense": torch.full((64, 32), float(step)), "momentum": table.sum(1)}


def state(step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """State of ``step`` as one rank holds it: the table and its momentum by rows, the dense part whole."""
    whole = values(step)
    if not dist.is_initialized():
        return {"model": whole}
    return {
        "model": {
            "table": _by_rows(whole["table"], rank, world),
            "dense": whole["dense"],
            "momentum": _by_rows(whole["momentum"], rank, world),
        }
    }


def matches(found: dict[str, Any], step: int) -> bool:
    """Whether a single-process state holds exactly the values of ``step``."""
    return all(torch.equal(found["model"][name], value) for name, value in values(step).items())


def save_steps(rank: int, world: int, folder: str, steps: list[int], keep: int) -> None:
    """Saves each of ``steps`` in turn; a case for ``run_ranks``."""
    store = CheckpointStore(Path(folder), keep)
    for step in steps:
        store.save(step, state(step, rank, world), {"cursor": step * 100, "ledger": {"seen": list(range(step % 7))}})


def _by_rows(whole: Tensor, rank: int, world: int) -> ShardedTensor:
    rows = len(whole) // world
    shards = [
        ShardMetadata(
            shard_offsets=[r * rows] + [0] * (whole.dim() - 1),
            shard_sizes=[rows, *whole.shape[1:]],
            placement=f"rank:{r}/cpu",
        )
        for r in range(world)
    ]
    mine = whole[rank * rows : (rank + 1) * rows].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            [Shard(mine, shards[rank])],
            ShardedTensorMetadata(shards, whole.shape, TensorProperties(dtype=whole.dtype)),
        )
