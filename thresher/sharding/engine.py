"""How the tables of a rank are stored and updated: what our sharders know beyond TorchRec's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from thresher.embeddings.group import RowSumExchange, StepContext
from thresher.embeddings.init import init_scale
from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.optimizers import TableOptimizer, fused_params
from thresher.embeddings.policy.config import TierConfig, TierStorage
from thresher.embeddings.policy.plan import TableTierPlan, tier_plan
from thresher.embeddings.policy.storage import SlabFiles
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.tables import TableInfo
from thresher.sharding.columns import ColumnGroups, OwnColumns, RowSums


@dataclass(frozen=True)
class Engine:
    """Shared by all collections of a model.

    Attributes:
        seed: with a table's path in the model it determines initial values and rounding of tables with tiers.
        tiers: of rows; None for none.
        infos: all tables of the model; needed for tiers only.
        in_order: importance of the samples of a global batch, rank after rank.
        staggered: the same in the order of table-row-wise and grid sharding (``importance.py``).
        columns: process groups of ranks that share rows.
    """

    optimizer: TableOptimizer
    seed: int = 0
    tiers: TierConfig | None = None
    infos: tuple[TableInfo, ...] = ()
    in_order: StepContext = field(default_factory=StepContext)
    staggered: StepContext = field(default_factory=StepContext)
    columns: ColumnGroups = field(default_factory=ColumnGroups)

    @cached_property
    def files(self) -> SlabFiles:
        """Of records that do not live in memory."""
        return SlabFiles(self.tiers.storage if self.tiers is not None else TierStorage())

    @cached_property
    def plans(self) -> dict[str, TableTierPlan]:
        """Tables with tiers, by path."""
        if self.tiers is None:
            return {}
        return {table.path: table for table in tier_plan(self.infos, self.tiers, self.optimizer).tiered}

    def is_tiered(self, path: str) -> bool:
        """Whether the rows of the table at ``path`` in the model have tiers."""
        return path in self.plans

    def leaves_to_fbgemm(self, shards: Sequence[ShardedEmbeddingTable], module: str, device: torch.device) -> bool:
        """Whether TorchRec's own kernel serves a group of tables: on CUDA, if it does all that is asked of them."""
        cut = any(shard.local_cols != shard.embedding_dim for shard in shards)
        exact = cut and self.optimizer.has_scalar and self.optimizer.column_state == "exact"
        tiered = any(self.is_tiered(path_of(module, shard.name)) for shard in shards)
        return device.type == "cuda" and bool(fused_params(self.optimizer)) and not tiered and not exact

    def exchange(self, shards: Sequence[ShardedEmbeddingTable]) -> RowSumExchange | None:
        """How a group of tables comes to sums over whole rows; None where every shard has them, or none is needed."""
        if not self.optimizer.has_scalar or all(shard.local_cols == shard.embedding_dim for shard in shards):
            return None
        if self.optimizer.column_state == "separate":
            return OwnColumns([shard.embedding_dim / shard.local_cols for shard in shards])
        return RowSums(shards, self.columns)

    def tables(self, shards: Sequence[ShardedEmbeddingTable], module: str, device: torch.device) -> list[Table]:
        """Storage of a group of tables. Flat shards of one table, which stand together, lie together in memory."""
        found: list[Table] = []
        for name, group in groupby(shards, key=lambda shard: shard.name):
            parts = list(group)
            path = path_of(module, name)
            found += (
                [self._tiered(p, path, device) for p in parts] if self.is_tiered(path) else self._flat(parts, device)
            )
        return found

    def _flat(self, parts: Sequence[ShardedEmbeddingTable], device: torch.device) -> list[Table]:
        rows, cols = parts[0].local_rows, parts[0].local_cols
        memory = FlatTable(parts[0].name, rows * len(parts), cols, scalar=False, vectors=0, device=device).weights
        return [
            FlatTable(
                part.name,
                rows,
                cols,
                scalar=self.optimizer.has_scalar,
                vectors=self.optimizer.vectors,
                full_dim=part.embedding_dim,
                weights=weights,
                device=device,
            )
            for part, weights in zip(parts, torch.split(memory, rows), strict=True)
        ]

    def _tiered(self, shard: ShardedEmbeddingTable, path: str, device: torch.device) -> TieredTable:
        plan = self.plans[path]
        row0, col0 = shard.local_metadata.shard_offsets
        rows, cols, vectors = shard.local_rows, shard.local_cols, self.optimizer.vectors
        files = self.files.paths(path, plan.levels, rows, cols, vectors, row0, col0)
        table = TieredTable(
            shard.name,
            path,
            rows,
            cols,
            seed=self.seed,
            init_scale=init_scale(shard.num_embeddings, self.optimizer.init_scale),
            scalar=self.optimizer.has_scalar,
            vectors=vectors,
            levels=plan.levels,
            entry=plan.entry,
            row0=row0,
            col0=col0,
            full_dim=shard.embedding_dim,
            files=files,
            device=device,
        )
        if files:
            self.files.adopt(table, list(files.values()))
        return table


def path_of(module: str, table: str) -> str:
    """A table's name within the model."""
    return f"{module}.{table}" if module else table
