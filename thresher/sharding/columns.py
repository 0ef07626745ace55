"""Row-wise optimizers where a row is cut: sums of squares over all its column shards.

    rank 0   a[:, 0:8]   sums of a's rows over 8 columns  \
    rank 1   a[:, 8:16]  sums of a's rows over 8 columns  /  all-reduced: both update with the sum over 16

The ranks that hold parts of the same rows of a table are a process group of their own. All of them look the same ids
up, so their distinct rows are the same, in the same order. Groups are made when tables are sharded, in the order of
the plan; exchanges run in the backward, whose order is the same on all ranks.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.types import ParameterSharding

from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.rows.flat import FlatTable
from thresher.errors import PlanError

Holders = tuple[int, ...]
"""Ranks that hold columns of the same rows of a table, ascending."""


class ColumnGroups:
    """The process groups of ranks that share rows; one for each set of ranks, made once."""

    def __init__(self) -> None:
        self._groups: dict[Holders, ProcessGroup] = {}

    def prepare(self, plans: Iterable[ParameterSharding], group: ProcessGroup) -> None:
        """Makes the groups that tables placed like this need. All ranks call it with the same plans.

        Ranks make also the groups that they are no part of: torch names groups by how many there were before.

        Raises:
            PlanError: ``group`` are not all ranks of the job.
        """
        for plan in plans:
            shards = [] if plan.sharding_spec is None else plan.sharding_spec.shards
            for row0 in sorted({shard.shard_offsets[0] for shard in shards}):
                ranks = holders(shards, row0)
                if len(ranks) > 1 and ranks not in self._groups:
                    _require_all(group)
                    self._groups[ranks] = dist.new_group(list(ranks))

    def __getitem__(self, ranks: Holders) -> ProcessGroup:
        return self._groups[ranks]


def holders(shards: Sequence[ShardMetadata], row0: int) -> Holders:
    """The ranks of the shards that start at row ``row0``."""
    return tuple(sorted({_rank(shard) for shard in shards if shard.shard_offsets[0] == row0}))


def _require_all(group: ProcessGroup) -> None:
    if group.size() != dist.get_world_size():
        raise PlanError(
            f"tables are cut by columns over {group.size()} ranks of {dist.get_world_size()}, and their row-wise "
            "optimizer adds up over whole rows",
            where="sharding",
            fix="shard over all ranks, or set column_state of the optimizer to separate",
        )


def _rank(shard: ShardMetadata) -> int:
    assert shard.placement is not None
    rank = shard.placement.rank()
    assert rank is not None
    return rank


class RowSums:
    """Adds sums of squares up over the column shards of each row; the exchange of one group of tables.

    Args:
        shards: this rank's, in the order of the group's tables; those of one table stand together.
    """

    def __init__(self, shards: Sequence[ShardedEmbeddingTable], groups: ColumnGroups) -> None:
        self._keys = [(shard.name, shard.local_metadata.shard_offsets[0]) for shard in shards]
        self._shared: dict[Holders, list[tuple[str, int]]] = {}
        for shard, key in sorted(zip(shards, self._keys, strict=True), key=lambda pair: pair[1]):
            ranks = holders(shard.global_metadata.shards_metadata, key[1])
            if len(ranks) > 1 and key not in self._shared.setdefault(ranks, []):
                self._shared[ranks].append(key)
        self._groups = {ranks: groups[ranks] for ranks in self._shared}
        self._first = {
            key: next(
                _rank(part) for part in shard.global_metadata.shards_metadata if part.shard_offsets == [key[1], 0]
            )
            for shard, key in zip(shards, self._keys, strict=True)
        }

    def __call__(self, sums: list[Tensor]) -> list[Tensor]:
        """For each table [U] fp32, over whole rows. Collective over the ranks that share rows."""
        totals: dict[tuple[str, int], Tensor] = {}
        for key, part in zip(self._keys, sums, strict=True):
            totals[key] = totals[key] + part if key in totals else part
        for ranks, keys in sorted(self._shared.items()):
            together = torch.cat([totals[key] for key in keys])
            dist.all_reduce(together, group=self._groups[ranks])
            totals |= dict(zip(keys, torch.split(together, [totals[key].numel() for key in keys]), strict=True))
        return [totals[key] for key in self._keys]

    def spread(self, tables: Sequence[Table]) -> None:
        """Gives the scalars of each row's first columns to its others, as after reading a checkpoint. Collective.

        Args:
            tables: this rank's, in the order of the group's tables; those with tiers are passed over.
        """
        flat = [(k, t) for k, t in zip(self._keys, tables, strict=True) if isinstance(t, FlatTable)]
        scalars = {key: table.scalar for key, table in reversed(flat)}
        for ranks, keys in sorted(self._shared.items()):
            for key in keys:
                if key in scalars:
                    dist.broadcast(scalars[key], self._first[key], group=self._groups[ranks])
        for key, table in flat:
            table.scalar.copy_(scalars[key])


class OwnColumns:
    """Keeps a scalar for each column shard of a row, as TorchRec does: the mean is over the shard's columns.

    Args:
        shares: for each table of the group, columns of the whole table over those of the shard.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = tuple(shares)

    def __call__(self, sums: list[Tensor]) -> list[Tensor]:
        """For each table [U] fp32, such that the mean over the whole width is the shard's own mean."""
        return [part * share for part, share in zip(sums, self._shares, strict=True)]
