"""Weights of a model with tiers, as torch DCP saves and loads them: tiered rows as they are stored, block by block.

Beside the tensors of the other tables and of the dense part, the state has an entry ``tiers`` with one key a block:

    bags.item:r65536+65536:c0+64        rows 65536 .. 131071 of table bags.item, columns 0 .. 63

Blocks are made and taken in one at a time, so saving and loading need memory for one block beyond the tables (column
shards that become wider wait for each other). Any plan may load them: rows are cut and joined exactly, columns as
``tier_columns.py`` says. What concerns a whole table (thresholds, number of updates) stands among the facts.

A table may have tiers on one side only. Into a flat table rows are decoded, and rows never updated get their initial
values; into a table with tiers fp32 weights go in its entry tier, to nearest, with no priority and no optimizer state.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from thresher.embeddings.rows.tiered import TieredTable
from thresher.errors import CheckpointError
from thresher.sharding.tier_blocks import block_ranges, encoded_size
from thresher.sharding.tier_targets import (
    FlatTarget,
    Incoming,
    Once,
    Outgoing,
    Pending,
    Rectangles,
    Target,
    TieredTarget,
)

TIERS = "tiers"
_KEY = re.compile(r"(?P<path>.+):r(?P<row>\d+)\+(?P<rows>\d+):c(?P<col>\d+)\+(?P<cols>\d+)")


@dataclass(frozen=True)
class TableShape:
    """A table of the model.

    Attributes:
        weight: its key in the model's state dict.
        columns: (first, number) of each of its column shards.
        separate: whether column shards keep scalars of their own (``column_state: separate``).
        tiered: whether it has tiers.
    """

    weight: str
    rows: int
    dim: int
    columns: tuple[tuple[int, int], ...]
    separate: bool
    tiered: bool


class ModelState:
    """The weights of a model, as a part of a checkpoint.

    Args:
        module: whose state dict has everything that is no table with tiers.
        tables: this rank's shards of tables with tiers.
        shapes: all tables of the model by path.
    """

    def __init__(self, module: nn.Module, tables: Sequence[TieredTable], shapes: Mapping[str, TableShape]) -> None:
        self._module, self._tables, self._shapes = module, tables, shapes
        self._unbegun: list[Once] = []
        self._facts: Mapping[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """What is saved. Blocks are read when they are written, so the tables must not change until then."""
        blocks = {
            _key(table, first, rows): Outgoing(table, first, rows, size)
            for table in self._tables
            for first, rows in block_ranges(table.row0, table.rows)
            if (size := encoded_size(table, first, rows))
        }
        flat = self._plain()
        return flat | {TIERS: blocks} if blocks else flat

    def facts(self) -> dict[str, Any]:
        """What is saved of whole tables, by path; JSON, alike on all ranks that have a shard."""
        return {table.path: self._facts_of(table) for table in self._tables}

    def prepare(self, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint with the keys ``saved`` and these ``facts`` is read into.

        Raises:
            CheckpointError: a table has other tiers, another seed or other state in it; nothing has changed.
        """
        self._facts, self._unbegun = facts, []
        wanted, blocks = self._plain(), _blocks(saved)
        found: dict[str, Any] = {}
        for path, shape in self._shapes.items():
            shards = [table for table in self._tables if table.path == path]
            if path in facts:
                _require_fit(path, shape, [self._facts_of(table) for table in shards], facts[path], blocks[path])
                targets: list[Target] = [TieredTarget(table) for table in shards]
                targets = targets or _flat_targets(wanted.pop(shape.weight, None), path, facts[path])
                found |= self._incoming([self._once(target) for target in targets], blocks[path])
            elif shape.tiered and shape.weight in saved:
                _require_shape(path, shape, saved[shape.weight].size)
                wanted[shape.weight] = Rectangles([(self._once(TieredTarget(table)), table) for table in shards])
            elif shape.tiered:
                wanted[shape.weight] = None
        return wanted | {TIERS: found} if found else wanted

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Ends loading: what was read into tables is in place."""
        for once in self._unbegun:
            once.begun()
        for table in self._tables:
            found = self._facts.get(table.path)
            if found is not None:
                table.step, table.gain = found["step"], found["gain"]
                table.promote_above, table.keep_from = list(found["promote_above"]), list(found["keep_from"])
        own: dict[str, Any] = self._module.state_dict()
        self._module.load_state_dict(own | dict(state_dict))

    def _plain(self) -> dict[str, Any]:
        """The module's state without tables with tiers."""
        tiered = {shape.weight for shape in self._shapes.values() if shape.tiered}
        return {key: value for key, value in self._module.state_dict().items() if key not in tiered}

    def _once(self, target: Target) -> Once:
        once = Once(target)
        self._unbegun.append(once)
        return once

    def _incoming(self, targets: Sequence[Once], blocks: "_Blocks") -> dict[str, Incoming]:
        needs: dict[str, list[Pending]] = {}
        by_rows: dict[tuple[int, int], dict[int, tuple[str, int]]] = {}
        for key, (rows, (col0, cols), _) in blocks.items():
            by_rows.setdefault(rows, {})[col0] = (key, cols)
        for once in targets:
            target = once.target
            for (first, count), parts in by_rows.items():
                if first >= target.row0 + target.rows or first + count <= target.row0:
                    continue
                crossing = {c: (key, n) for c, (key, n) in parts.items() if _cross(c, n, target.col0, target.cols)}
                pending = Pending(once, [(col0, cols) for col0, (_, cols) in crossing.items()])
                for key, _ in crossing.values():
                    needs.setdefault(key, []).append(pending)
        return {
            key: Incoming(blocks[key][0][0], blocks[key][1][0], blocks[key][2], pending)
            for key, pending in needs.items()
        }

    def _facts_of(self, table: TieredTable) -> dict[str, Any]:
        shape = self._shapes[table.path]
        return {
            "rows": shape.rows,
            "dim": shape.dim,
            "seed": table.seed,
            "init_scale": table.init_scale,
            "levels": [tier.name.lower() for tier in table.levels],
            "scalar": table.has_scalar,
            "vectors": table.n_vectors,
            "separate": shape.separate,
            "step": table.step,
            "gain": table.gain,
            "promote_above": list(table.promote_above),
            "keep_from": list(table.keep_from),
        }


_Blocks = dict[str, tuple[tuple[int, int], tuple[int, int], torch.Size]]
"""By key: (first row, rows), (first column, columns), size."""


def _key(table: TieredTable, first: int, rows: int) -> str:
    return f"{table.path}:r{first}+{rows}:c{table.col0}+{table.dim}"


def _blocks(saved: Mapping[str, Any]) -> dict[str, _Blocks]:
    """The blocks in a checkpoint by path of the table."""
    found: dict[str, _Blocks] = defaultdict(dict)
    for name, stored in saved.items():
        prefix, _, key = name.partition(".")
        match = _KEY.fullmatch(key) if prefix == TIERS else None
        if match is not None and isinstance(stored, TensorStorageMetadata):
            rows, columns = (int(match["row"]), int(match["rows"])), (int(match["col"]), int(match["cols"]))
            found[match["path"]][key] = (rows, columns, stored.size)
    return found


def _cross(first: int, count: int, other: int, others: int) -> bool:
    return first < other + others and other < first + count


def _flat_targets(weight: Any, path: str, facts: Mapping[str, Any]) -> list[Target]:
    """This rank's parts of a flat table."""
    if isinstance(weight, ShardedTensor):
        parts = [(shard.tensor, shard.metadata.shard_offsets) for shard in weight.local_shards()]
        return [FlatTarget(tensor, row0, col0, path, facts) for tensor, (row0, col0) in parts]
    return [] if weight is None else [FlatTarget(weight, 0, 0, path, facts)]


def _require_shape(path: str, shape: TableShape, size: Sequence[int]) -> None:
    if tuple(size) != (shape.rows, shape.dim):
        raise CheckpointError(
            f"table '{path}' is {list(size)}, the model wants {[shape.rows, shape.dim]}",
            fix="load it into a model of the same tables",
        )


def _require_fit(
    path: str, shape: TableShape, tables: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], blocks: _Blocks
) -> None:
    """Whether a table with tiers (``facts``, ``blocks``) can be loaded; ``tables`` are facts of this rank's shards."""
    _require_shape(path, shape, (facts["rows"], facts["dim"]))
    for name in _NAMES:
        for table in tables:
            if table[name] != facts[name]:
                raise CheckpointError(
                    f"table '{path}' was saved with {_NAMES[name]} {_told(facts[name])}, this run has "
                    f"{_told(table[name])}",
                    fix="keep the tiers, the table optimizer and the seed that it was saved with",
                )
    before = tuple(sorted({columns for _, columns, _ in blocks.values()}))
    apart = facts["scalar"] and (facts["separate"] or shape.separate)
    if shape.tiered and apart and before and before != shape.columns:
        raise CheckpointError(
            f"table '{path}' has optimizer state of one number per row and split of the columns: saved for columns "
            f"{_spans(before)}, this plan has {_spans(shape.columns)}",
            fix="keep the table's column split, or train it with column_state exact",
        )


_NAMES = {
    "levels": "tiers",
    "seed": "seed",
    "init_scale": "initial values up to",
    "scalar": "a scalar a row:",
    "vectors": "vectors of optimizer state:",
}


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _spans(columns: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first}..{first + count - 1}" for first, count in columns)
