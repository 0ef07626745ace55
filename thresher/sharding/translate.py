"""Between our :class:`Plan` and TorchRec's ``ShardingPlan``."""

from collections.abc import Sequence

from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.tables import TableInfo
from thresher.sharding.footprint import Footprint
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
    plan: ShardingPlan, infos: Sequence[TableInfo], footprint: Footprint, world: int, local_world: int
) -> Plan:
    """TorchRec's plan as ours; its tables come in the order of ``infos``, their bytes from ``footprint``."""
    shapes = {(info.module, info.table): (number, info) for number, info in enumerate(infos)}
    found: dict[int, TablePlan] = {}
    for module, parameters in plan.plan.items():
        for name, parameter in parameters.items():
            number, info = shapes[module, name]
            found[number] = _table(info, parameter, world)
    tables = tuple(found[number] for number in sorted(found))
    return footprint.priced(Plan(world=world, local_world=local_world, tables=tables))


def _table(info: TableInfo, parameter: ParameterSharding, world: int) -> TablePlan:
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
        shards=tuple(Shard(rank=r, row0=row0, rows=n, col0=col0, cols=m, bytes=0) for r, row0, n, col0, m in cuts),
    )


def notes_of(plan: Plan, optimizer: TableOptimizer) -> tuple[str, ...]:
    """What training means under this placement where it is not what the unsharded model would do."""
    split = [table for table in plan.tables if table.splits_columns]
    notes = []
    if split and optimizer.has_scalar and optimizer.column_state == "separate":
        notes.append(
            f"{optimizer.name} with column_state separate takes the mean of squared gradients over each column shard, "
            f"not over the row, in tables {_paths(split)}: results differ from those of uncut tables"
        )
    scaled = [table for table in split if {"int8", "int4"} & set(table.tiers)]
    if scaled:
        notes.append(
            f"rows in int8 and int4 have a scale for each column shard in tables {_paths(scaled)}: they are rounded "
            "more finely than in uncut tables, so results differ"
        )
    return tuple(notes)


def _paths(tables: Sequence[TablePlan]) -> str:
    return ", ".join(table.path for table in tables)
