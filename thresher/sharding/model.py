"""A model turned into its share on this rank: tables by plan, everything else replicated."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.init import fill, init_scale
from thresher.embeddings.optimizers import ReplicatedTables, TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.controller import TierController
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.tables import find_tables
from thresher.errors import PlanError
from thresher.sharding.check import check_plan
from thresher.sharding.dynamic import check_dynamic
from thresher.sharding.held import ShardedTables, TableShard
from thresher.sharding.plan import Plan, TablePlan, WireConfig
from thresher.sharding.replicate import ReplicateDense
from thresher.sharding.sharders import sharders
from thresher.sharding.translate import notes_of, to_torchrec
from thresher.sharding.wire import codecs


class ShardedModel:
    """A model whose tables are sharded, as one rank trains it.

    One step:  loss = model.loss(sharded.wrapped(batch), batch); loss.backward(); sharded.step_tables(); then the
    optimizer of ``dense_parameters()``. The backward itself updates the fused tables; ``step_tables`` updates the
    replicated ones, whose gradients it has averaged over the ranks. With tiers the step begins with ``observe``.

    Attributes:
        wrapped: call it for the forward. Collective: every rank calls it with its own batch, also an empty one.
        plan: what is in force.
        table_optimizer: of all tables. Its state dict is keyed by table; a changed ``lr`` of its parameter groups
            takes effect at its next ``step``.
        held: this rank's tables; None where the model has none.
    """

    def __init__(self, wrapped: DistributedModelParallel, plan: Plan, optimizer: TableOptimizer) -> None:
        self.wrapped, self.plan = wrapped, plan
        keys = {weight_key(wrapped, table) for table in plan.tables if table.kernel == "dense"}
        named = dict(in_backward_optimizer_filter(wrapped.named_parameters()))
        self._replicated = {name: parameter for name, parameter in named.items() if name in keys}
        self._dense = {name: parameter for name, parameter in named.items() if name not in keys}
        parts = [("", wrapped.fused_optimizer)]
        if self._replicated:
            parts.append(("", ReplicatedTables(self._replicated, optimizer)))
        self.table_optimizer = CombinedOptimizer(parts)
        self.held = ShardedTables(wrapped) if plan.tables else None
        wrapped.register_forward_pre_hook(self._require_stepped)

    def tables(self) -> tuple[TableShard, ...]:
        """The rectangles of tables that our engine holds on this rank."""
        return () if self.held is None else self.held.tables

    @property
    def tiers(self) -> TierController | None:
        """What keeps rows in their tiers; None without tiers."""
        return None if self.held is None else self.held.controller

    def observe(self, importance: Tensor) -> None:
        """Says how much this rank's samples [B] count for priorities in the next backward; without tiers nothing.

        Collective; before the forward. Rows of samples that nothing was said about count 1 each.
        """
        if self.held is not None:
            self.held.observe(importance)

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters outside the tables, by name: what the dense optimizer is for."""
        return dict(self._dense)

    def step_tables(self) -> None:
        """Ends the step of the tables: applies the gradients of replicated ones, and forgets them; moves rows between
        tiers when it is time. Collective; call it after every backward."""
        self.table_optimizer.step()
        if self.held is not None:
            self.held.step()

    def set_table_lr(self, lr: float) -> None:
        """Sets the learning rate of all tables from the next backward on."""
        for group in self.table_optimizer.param_groups:
            group["lr"] = lr
        self.table_optimizer.step()

    def _require_stepped(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if torch.is_grad_enabled() and any(parameter.grad is not None for parameter in self._replicated.values()):
            raise RuntimeError("gradients of data-parallel tables are pending: call step_tables() after each backward")


def shard(
    model: nn.Module,
    plan: Plan,
    *,
    device: torch.device,
    optimizer: TableOptimizer,
    seed: int,
    group: ProcessGroup | None = None,
    tiers: TierConfig | None = None,
    dynamic: Mapping[str, DynamicTable] | None = None,
    wire: WireConfig | None = None,
) -> ShardedModel:
    """Shards the tables of ``model`` in place by ``plan`` and replicates the rest. Collective.

    A process group is needed also for one rank (TorchRec has no other way to name shards). Initial weights of tables
    depend on (seed, table) alone; those of the dense part are rank 0's.

    Args:
        model: its tables may be on the meta device, its dense part must be real.
        optimizer: of the tables; updates them in the backward.
        group: of all ranks; None for torch's default group.
        tiers: of rows; None for fp32 tables.
        dynamic: tables whose ids are raw, by name.
        wire: precision of what ranks send each other; None for fp32.

    Raises:
        ConfigError: the tiers do not fit the tables.
        PlanError: the plan does not fit the model or the ranks, or a dense parameter is on the meta device.
    """
    group = group or torch.distributed.group.WORLD
    if group is None:
        raise PlanError("there is no process group", fix="call torch.distributed.init_process_group, also for one rank")
    world, rank = group.size(), group.rank()
    infos = find_tables(model)
    check_plan(plan, infos, world, get_local_size(world), "plan")
    check_dynamic(plan, dynamic or {}, tiers)
    _require_real(model, {f"{info.module}." for info in infos})
    if rank == 0:
        for note in notes_of(plan, optimizer):
            warnings.warn(note, stacklevel=2)
    registry = codecs(wire or WireConfig(), plan, [info.path for info in infos if not info.pooled])
    wrapped = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=to_torchrec(plan, device.type),
        sharders=sharders(optimizer, model=model, tiers=tiers, dynamic=dynamic, seed=seed, codecs=registry),
        data_parallel_wrapper=ReplicateDense(),
    )
    sharded = ShardedModel(wrapped, plan, optimizer)
    if sharded.held is not None:
        sharded.held.forget()
    tiered = {table.path for table in sharded.tables() if isinstance(table.storage, TieredTable)}
    _init_tables(wrapped, [table for table in plan.tables if table.path not in tiered], seed, optimizer.init_scale)
    return sharded


def _require_real(model: nn.Module, collections: set[str]) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta and not any(name.startswith(prefix) for prefix in collections):
            raise PlanError(
                f"'{name}' is on the meta device, where nothing initialises it",
                where=f"model {type(model).__name__}",
                fix="build dense layers on a real device; only tables may be on meta",
            )


def _init_tables(wrapped: DistributedModelParallel, tables: Sequence[TablePlan], seed: int, scale: float) -> None:
    """Fills tables of fp32; rows with tiers have their initial values until they are updated."""
    state = wrapped.state_dict()
    for table in tables:
        for weight, row0, col0 in _local_parts(state[weight_key(wrapped, table)]):
            fill(weight, seed, table.path, table.dim, init_scale(table.rows, scale), row0, col0)


def _local_parts(weight: Tensor | ShardedTensor) -> list[tuple[Tensor, int, int]]:
    """This rank's rectangles of a table with their first row and column."""
    if not isinstance(weight, ShardedTensor):
        return [(weight, 0, 0)]
    parts = [(part.tensor, part.metadata.shard_offsets) for part in weight.local_shards()]
    return [(tensor, row0, col0) for tensor, (row0, col0) in parts]


def weight_key(wrapped: DistributedModelParallel, table: TablePlan) -> str:
    """The name of a table's weight among the model's parameters."""
    module = wrapped.module.get_submodule(table.module)
    folder = "embedding_bags" if hasattr(module, "embedding_bags") else "embeddings"
    return ".".join(part for part in (table.module, folder, table.table, "weight") if part)
