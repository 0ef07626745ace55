"""Storage of a table to tensors and back, bit for bit, for a process that goes on with the same shards."""

from typing import Any

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import FREE, HIGH, TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import CheckpointError

Snapshot = dict[str, Any]


def take_snapshot(table: Table) -> Snapshot:
    """Copies of everything a table holds: tensors, numbers and lists of numbers.

    Of slabs and free stacks only what is in use is copied.
    """
    saved: Snapshot = {"shape": [table.rows, table.dim], "step": table.step}
    saved |= {name: tensor.clone() for name, tensor in _fixed(table).items()}
    if isinstance(table, TieredTable):
        saved |= {"gain": table.gain, "keep_from": list(table.keep_from), "promote_above": list(table.promote_above)}
        saved |= {name: tensor.clone() for name, tensor in _used(table).items()}
    return saved


@torch.no_grad()
def load_snapshot(table: Table, saved: Snapshot) -> None:
    """Becomes what :func:`take_snapshot` described.

    Raises:
        CheckpointError: that was a table of another shape, optimizer or set of tiers.
    """
    fixed = _fixed(table)
    names = sorted(_names(table))
    if saved.get("shape") != [table.rows, table.dim] or sorted(saved) != names:
        raise CheckpointError(
            f"a table of shape {saved.get('shape')} with {', '.join(sorted(saved))} was saved, this one has shape "
            f"{[table.rows, table.dim]} with {', '.join(names)}",
            where=f"table '{table.name}'",
            fix="load it into a table of the same rows, dim, optimizer and tiers",
        )
    for name, tensor in fixed.items():
        tensor.copy_(saved[name])
    table.step = saved["step"]
    if isinstance(table, TieredTable):
        table.gain = saved["gain"]
        table.keep_from, table.promote_above = list(saved["keep_from"]), list(saved["promote_above"])
        for name, tensor in _used(table).items():
            tensor.copy_(saved[name])
        for tier in table.stored_levels:
            table.trim(tier)


def _names(table: Table) -> set[str]:
    """The keys of a table's snapshot."""
    names = {"shape", "step", *_fixed(table)}
    return names | {"gain", "keep_from", "promote_above", *_used(table)} if isinstance(table, TieredTable) else names


def _fixed(table: Table) -> dict[str, Tensor]:
    """Tensors whose size does not change."""
    if isinstance(table, FlatTable):
        vectors = {f"vector{number}": vector for number, vector in enumerate(table.vectors)}
        return {"weights": table.weights, "scalar": table.scalar} | vectors
    return {"desc": table.desc, "stat": table.stat, "count": table.count}


def _used(table: TieredTable) -> dict[str, Tensor]:
    """Parts of slabs and free stacks that are in use, by ``count``."""
    used: dict[str, Tensor] = {}
    for tier in table.stored_levels:
        high, free = table.count[tier, HIGH], table.count[tier, FREE]
        used[f"slab.{Tier(tier).name}"] = table.slabs[tier][: int(high) * table.record_bytes(tier)]
        used[f"free.{Tier(tier).name}"] = table.free[tier][: int(free)]
    return used
