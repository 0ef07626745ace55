"""The tables that one rank holds, found in a sharded model: for training with tiers, checkpoints and reports."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.types import ParameterSharding

from thresher.embeddings.dynamic.directory import IdDirectory
from thresher.embeddings.kernels.backend import Table, pick_backend
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.controller import TierController
from thresher.embeddings.policy.ledger import AllReduce
from thresher.embeddings.policy.plan import tier_plan
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.tables import FLOAT_BYTES
from thresher.errors import PlanError
from thresher.sharding.engine import Engine, path_of
from thresher.sharding.importance import Importance
from thresher.sharding.kernel import TableKernel
from thresher.sharding.sharders import ShardedEmbeddingBagCollection, ShardedEmbeddingCollection

ShardedCollection = ShardedEmbeddingBagCollection | ShardedEmbeddingCollection


@dataclass(frozen=True)
class TableShard:
    """A rectangle of a table on this rank.

    Attributes:
        path, name: of the table in the model and in its collection.
        rows, dim: shape of the whole table.
        row0, col0: where the rectangle starts in it.
        features: keys of the batch that look rows up in it.
        storage: its rows.
    """

    path: str
    name: str
    rows: int
    dim: int
    row0: int
    col0: int
    features: tuple[str, ...]
    storage: Table


class ShardedTables:
    """This rank's part of the tables of a model that our sharders sharded. Collective: all ranks make it.

    With tiers, a training step is ``observe(importance)``, forward, backward, ``step()``.

    Attributes:
        engine: what all collections share.
        tables: those that our engine holds: replicated ones are not among them, nor fp32 ones on CUDA.
        controller: keeps rows in their tiers; None without tiers.

    Raises:
        PlanError: the model has no collection that our sharders sharded, or several engines.
    """

    def __init__(self, model: nn.Module) -> None:
        collections = [module for module in model.modules() if isinstance(module, ShardedCollection)]
        self.engine = _engine(collections)
        self._kernels = [kernel for collection in collections for kernel in kernels(collection)]
        self.tables = tuple(table for kernel in self._kernels for table in _tables(kernel))
        self.controller: TierController | None = None
        self._importance: Importance | None = None
        self._open = False
        if self.engine.tiers is not None:
            self._begin(collections)

    def observe(self, importance: Tensor) -> None:
        """Says how much this rank's samples [B] count for priorities until the step ends. Collective; before the
        forward. Nothing without tiers."""
        if self._importance is not None:
            if self._open:
                self.step()
            self._importance.observe(importance)

    def step(self) -> None:
        """Ends a training step: moves rows between tiers when it is time, and forgets what samples count. Collective;
        nothing without tiers."""
        self._open = False
        self.engine.in_order.importance = self.engine.staggered.importance = None
        if self.controller is not None:
            self.controller.after_step(kernel.group.stats for kernel in self._kernels)

    def follow(self, model: nn.Module) -> None:
        """Ends each training step of ``model`` by itself: when the next one begins, with ``observe`` or a forward."""
        model.register_forward_pre_hook(self._begin_step)

    def _begin_step(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if torch.is_grad_enabled():
            if self._open:
                self.step()
            self._open = True

    def directories(self) -> dict[str, IdDirectory]:
        """Which row belongs to which id, for this rank's shards of tables with raw ids."""
        return {
            f"{path_of(kernel.module, shard.name)}:r{row0}:c{col0}": kernel.group.dynamic.directories[number]
            for kernel in self._kernels
            if kernel.group.dynamic is not None
            for number, shard in enumerate(kernel.config.embedding_tables)
            if number in kernel.group.dynamic.directories
            for row0, col0 in [shard.local_metadata.shard_offsets]
        }

    def forget(self) -> None:
        """Sets all rows of tables with tiers to their initial values, which take no memory."""
        for table in self.tiered():
            if bool(table.count.any()):
                for memory in (table.desc, table.stat, table.count):
                    memory.zero_()
                for tier in table.stored_levels:
                    table.trim(tier)

    def tiered(self) -> list[TieredTable]:
        """Storage of the tables with tiers."""
        return [table.storage for table in self.tables if isinstance(table.storage, TieredTable)]

    def _begin(self, collections: Sequence[ShardedCollection]) -> None:
        engine, env, device = self.engine, collections[0]._env, collections[0]._device
        assert engine.tiers is not None
        placed = {
            path_of(collection._module_fqn or "", name): plan
            for collection in collections
            for name, plan in collection.module_sharding_plan.items()
        }
        copied = [path for path, plan in placed.items() if plan.sharding_spec is None]
        # A table with raw ids that has no tiers counts as a flat one, at its full size: its rows come as they come.
        flat = [plan for path, plan in placed.items() if path not in engine.plans]
        for table in self.tiered():
            table.decay = engine.tiers.decay
        self._importance = Importance(engine, env.process_group, get_local_size(env.world_size))
        self.controller = TierController(
            [table for table in self.tiered() if table.path in engine.plans],
            tier_plan(engine.infos, engine.tiers, engine.optimizer, copied),
            engine.tiers,
            pick_backend(device),
            flat_bytes=sum(_bytes(plan, env.rank, engine.optimizer) for plan in flat),
            all_reduce=_all_reduce(env.process_group, device) if env.world_size > 1 else None,
            files=engine.files,
        )


def kernels(collection: ShardedCollection) -> Iterator[TableKernel]:
    """Our kernels in a sharded collection."""
    for lookup in collection._lookups:
        module = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
        yield from (kernel for kernel in module._emb_modules if isinstance(kernel, TableKernel))


def _engine(collections: Sequence[ShardedCollection]) -> Engine:
    engines = {id(collection._engine): collection._engine for collection in collections}
    if len(engines) != 1:
        raise PlanError(
            f"the model's collections were sharded by {len(engines)} lists of our sharders",
            where="sharders",
            fix="shard all collections with one list from sharders(...)",
        )
    (engine,) = engines.values()
    return engine


def _tables(kernel: TableKernel) -> Iterator[TableShard]:
    for shard, table in zip(kernel.config.embedding_tables, kernel.group.tables, strict=True):
        row0, col0 = shard.local_metadata.shard_offsets
        yield TableShard(
            path_of(kernel.module, shard.name),
            shard.name,
            shard.num_embeddings,
            shard.embedding_dim,
            row0,
            col0,
            tuple(shard.feature_names),
            table,
        )


def _bytes(plan: ParameterSharding, rank: int, optimizer: TableOptimizer) -> int:
    """Bytes of a flat table's shards on ``rank``, optimizer state included; 0 for replicated ones."""
    shards = [] if plan.sharding_spec is None else plan.sharding_spec.shards
    sizes = [shard.shard_sizes for shard in shards if shard.placement.rank() == rank]
    return sum(rows * cols * FLOAT_BYTES + optimizer.state_bytes(rows, cols) for rows, cols in sizes)


def _all_reduce(group: ProcessGroup, device: torch.device) -> AllReduce:
    def summed(tensor: Tensor) -> Tensor:
        moved = tensor.to(device)
        dist.all_reduce(moved, group=group)
        return moved.cpu()

    return summed
