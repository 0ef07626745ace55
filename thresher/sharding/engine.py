"""How the tables of a rank are stored and updated: what our sharders know beyond TorchRec's."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.types import ParameterSharding

from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.dynamic.directory import IdDirectory
from thresher.embeddings.dynamic.id_map import DictMap, Ids
from thresher.embeddings.dynamic.native_map import native_maps
from thresher.embeddings.dynamic.rows import DynamicRows, RowCut
from thresher.embeddings.group import RowSumExchange, StepContext
from thresher.embeddings.init import init_scale
from thresher.embeddings.kernels.backend import Backend, Table
from thresher.embeddings.optimizers import TableOptimizer, fused_params
from thresher.embeddings.policy.config import TierConfig, TierStorage
from thresher.embeddings.policy.plan import TableTierPlan, table_plans
from thresher.embeddings.policy.storage import SlabFiles
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.region import Region
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.embeddings.tables import TableInfo
from thresher.errors import PlanError
from thresher.sharding.columns import ColumnGroups, OwnColumns, RowSums


@dataclass(frozen=True)
class Engine:
    """Shared by all collections of a model.

    Attributes:
        seed: with a table's path in the model it determines initial values and rounding of tables with tiers.
        tiers: of rows; None for none.
        infos: all tables of the model; needed for tiers only.
        dynamic: tables whose ids are raw, by name.
        in_order: importance of the samples of a global batch, rank after rank.
        staggered: the same in the order of table-row-wise and grid sharding (``importance.py``).
        columns: process groups of ranks that share rows.
    """

    optimizer: TableOptimizer
    seed: int = 0
    tiers: TierConfig | None = None
    infos: tuple[TableInfo, ...] = ()
    dynamic: Mapping[str, DynamicTable] = field(default_factory=dict)
    in_order: StepContext = field(default_factory=StepContext)
    staggered: StepContext = field(default_factory=StepContext)
    columns: ColumnGroups = field(default_factory=ColumnGroups)

    @cached_property
    def files(self) -> SlabFiles:
        """Of records that do not live in memory."""
        return SlabFiles(self.tiers.storage if self.tiers is not None else TierStorage())

    @cached_property
    def plans(self) -> dict[str, TableTierPlan]:
        """Tables with tiers, by path; the budget is not looked at, for replicated tables are no part of it."""
        if self.tiers is None:
            return {}
        return {table.path: table for table in table_plans(self.infos, self.tiers, self.optimizer) if table.tiered}

    def is_tiered(self, path: str) -> bool:
        """Whether the table at ``path`` in the model is stored row by row: it has tiers, or its ids are raw."""
        return path in self.plans or path.rpartition(".")[2] in self.dynamic

    def leaves_to_fbgemm(self, shards: Sequence[ShardedEmbeddingTable], module: str, device: torch.device) -> bool:
        """Whether TorchRec's own kernel serves a group of tables: on CUDA, if it does all that is asked of them."""
        cut = any(shard.local_cols != shard.embedding_dim for shard in shards)
        exact = cut and self.optimizer.has_scalar and self.optimizer.column_state == "exact"
        tiered = any(self.is_tiered(path_of(module, shard.name)) for shard in shards)
        return device.type == "cuda" and bool(fused_params(self.optimizer)) and not tiered and not exact

    def prepare(self, plans: Iterable[ParameterSharding], group: ProcessGroup) -> None:
        """Makes what tables of a collection placed like this need of other ranks. Collective."""
        if self.optimizer.has_scalar and self.optimizer.column_state == "exact":
            self.columns.prepare(plans, group)

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

    def dynamic_rows(
        self, shards: Sequence[ShardedEmbeddingTable], tables: Sequence[Table], backend: Backend
    ) -> DynamicRows | None:
        """What gives rows to the raw ids of a group of tables; None where all ids are rows."""
        raw = {n: self.dynamic[shard.name] for n, shard in enumerate(shards) if shard.name in self.dynamic}
        if not raw:
            return None
        maps = native_maps() or DictMap
        identities = {n: table.identity for n, table in enumerate(tables) if isinstance(table, TieredTable)}
        directories = {n: IdDirectory(config, _numpy(identities[n]), maps) for n, config in raw.items()}
        return DynamicRows(tables, directories, backend, {n: _cut(shards[n]) for n in raw})

    def _tiered(self, shard: ShardedEmbeddingTable, path: str, device: torch.device) -> TieredTable:
        if shard.weight_init_min is not None or shard.weight_init_max is not None:
            raise PlanError(
                "rows with tiers or raw ids start uniform on (-s, s), not between weight_init_min and weight_init_max",
                where=f"table '{path}'",
                fix="leave both out, and set init_scale of the optimizer",
            )
        plan = self.plans.get(path)
        levels, entry = (plan.levels, plan.entry) if plan is not None else ((Tier.FP32,), Tier.FP32)
        row0, col0 = shard.local_metadata.shard_offsets
        rows, cols, vectors = shard.local_rows, shard.local_cols, self.optimizer.vectors
        files = self.files.paths(path, levels, rows, cols, vectors, row0, col0)
        table = TieredTable(
            shard.name,
            path,
            rows,
            cols,
            seed=self.seed,
            init_scale=init_scale(shard.num_embeddings, self.optimizer.init_scale),
            scalar=self.optimizer.has_scalar,
            vectors=vectors,
            levels=levels,
            entry=entry,
            row0=row0,
            col0=col0,
            full_dim=shard.embedding_dim,
            identity=identities(rows) if shard.name in self.dynamic else None,
            files=files,
            device=device,
        )
        if files:
            self.files.adopt(table, list(files.values()))
        return table


def identities(rows: int) -> Tensor:
    """[rows] int64 zeros, which take memory as they are written."""
    return Region(rows * 8).bytes[: rows * 8].view(torch.int64)


def _numpy(identity: Tensor | None) -> Ids:
    assert identity is not None, "dynamic tables have identities"
    array: Ids = identity.numpy()
    return array


def _cut(shard: ShardedEmbeddingTable) -> RowCut:
    """Shards of a table cut by rows have as many rows each, but for the last ones."""
    rows = {part.shard_offsets[0]: part.shard_sizes[0] for part in shard.global_metadata.shards_metadata}
    firsts = sorted(rows)
    return RowCut(firsts.index(shard.local_metadata.shard_offsets[0]), len(firsts), rows[0])


def path_of(module: str, table: str) -> str:
    """A table's name within the model."""
    return f"{module}.{table}" if module else table
