"""Between our :class:`Plan` and TorchRec's ``ShardingPlan``."""

from collections.abc import Sequence

from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.tables import FLOAT_BYTES, TableInfo
from thresher.sharding.plan import Plan, Shard, TablePlan


def to_torchrec(plan: Plan, device: str) -> ShardingPlan:
    """The plan as TorchRec takes it, on ``cpu`` or ``cuda``."""
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for table in plan.tables:
        module = modules.setdefault(table.module, EmbeddingModuleShardingPlan())
        module[table.table] = _parameter(table, device, plan.local_world)
    return ShardingPlan(modules)


def _parameter(table: TablePlan, device: str, local_world: int) -> ParameterSharding:
    ranks = [shard.rank for shard in table.shards]
    if table.sharding_type == "data_parallel":
        return ParameterSharding(table.sharding_type, table.kernel, ranks)
    shards = [
        ShardMetadata(
            shard_offsets=[shard.row0, shard.col0],
            shard_sizes=[shard.rows, shard.cols],
            placement=placement(device, shard.rank, local_world),
        )
        for shard in table.shards
    ]
    return ParameterSharding(table.sharding_type, table.kernel, ranks, EnumerableShardingSpec(shards))


def from_torchrec(
    plan: ShardingPlan, infos: Sequence[TableInfo], optimizer: TableOptimizer, world: int, local_world: int
) -> Plan:
    """TorchRec's plan as ours; its tables come in the order of ``infos``."""
    shapes = {(info.module, info.table): (number, info) for number, info in enumerate(infos)}
    found: dict[int, TablePlan] = {}
    for module, parameters in plan.plan.items():
        for name, parameter in parameters.items():
            number, info = shapes[module, name]
            found[number] = _table(info, parameter, optimizer, world)
    return Plan(world=world, local_world=local_world, tables=tuple(found[number] for number in sorted(found)))


def _table(info: TableInfo, parameter: ParameterSharding, optimizer: TableOptimizer, world: int) -> TablePlan:
    if parameter.sharding_spec is None:
        cuts = [(rank, 0, info.rows, 0, info.dim) for rank in range(world)]
    else:
        shards = parameter.sharding_spec.shards
        cuts = [
            (s.placement.rank(), s.shard_offsets[0], s.shard_sizes[0], s.shard_offsets[1], s.shard_sizes[1])
            for s in shards
        ]
    return TablePlan(
        module=info.module,
        table=info.table,
        rows=info.rows,
        dim=info.dim,
        sharding_type=parameter.sharding_type,
        kernel=parameter.compute_kernel,
        shards=tuple(_shard(*cut, optimizer) for cut in cuts),
    )


def _shard(rank: int, row0: int, rows: int, col0: int, cols: int, optimizer: TableOptimizer) -> Shard:
    size = rows * cols * FLOAT_BYTES + optimizer.state_bytes(rows, cols)
    return Shard(rank=rank, row0=row0, rows=rows, col0=col0, cols=cols, bytes=size)


def notes_of(plan: Plan, optimizer: TableOptimizer) -> tuple[str, ...]:
    """What ``optimizer`` means under this placement where it is not what the unsharded model would do."""
    split = [table.path for table in plan.tables if table.splits_columns]
    if not split or optimizer.name != "rowwise_adagrad":
        return ()
    return (
        f"rowwise_adagrad takes the mean of squared gradients over each column shard, not over the row, in tables "
        f"{', '.join(split)}: results differ from those of uncut tables (adagrad and sgd do not)",
    )
