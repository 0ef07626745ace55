"""From a model and what its user asked for to a :class:`Plan`. TorchRec's planner places; we check before and after."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError

from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.plan import tier_plan
from thresher.embeddings.tables import TableInfo, find_tables
from thresher.errors import PlanError, nearest
from thresher.sharding.check import check_complete, check_memory, check_plan
from thresher.sharding.cuts import BAG_TYPES, COLUMN_STEP, column_parts, column_width, refusals
from thresher.sharding.estimates import Enumerator
from thresher.sharding.footprint import Footprint
from thresher.sharding.frequencies import Frequency
from thresher.sharding.plan import Plan, TablePlan
from thresher.sharding.sharders import sharders
from thresher.sharding.topology import make_topology, table_memory
from thresher.sharding.translate import from_torchrec, notes_of

REPLICATE_BYTES = 1 << 16
"""``auto`` replicates pooled tables up to this size: so small an all-reduce is cheaper than routing ids and vectors."""
AUTO_TYPES = ("table_wise", "row_wise", "table_row_wise")
"""What ``auto`` chooses from for larger tables. Their results are those of uncut tables to the last bit. Column cuts
add up a row's squares in another order, give int8 rows a scale for each part, send every id to all parts and store a
header in each: a user must ask for them."""


def make_plan(
    model: nn.Module,
    *,
    world: int,
    local_world: int,
    device: str,
    optimizer: TableOptimizer,
    default: str = "auto",
    tables: Mapping[str, str] | None = None,
    memory_bytes: int = 0,
    batch_size: int = 512,
    tiers: TierConfig | None = None,
    frequencies: Mapping[str, Frequency] | None = None,
) -> Plan:
    """Places every table of ``model``; the same plan for the same arguments, on every rank.

    Args:
        model: unsharded; its tables may be on the meta device.
        world, local_world: ranks, and ranks of each machine.
        device: ``cpu`` or ``cuda``.
        optimizer: of the tables; its state counts as memory.
        default: sharding type of the tables not named in ``tables``; ``auto`` lets the planner choose.
        tables: sharding type by table name.
        memory_bytes: memory per rank for tables; 0 for a share of what the machine has.
        batch_size: samples per rank and step, for the planner's estimates.
        tiers: of rows; tables that have some count with the bytes they will take. None, or no budget: all are fp32.
        frequencies: measured lookups by the path of the table (``measure_frequencies``).

    Raises:
        ConfigError: the tiers do not fit the tables.
        PlanError: a type or table is unknown, a type does not fit its table and the ranks, or memory does not suffice;
            the message names the table, what was asked and what is possible.
    """
    _check_ranks(world, local_world)
    infos = find_tables(model)
    asked = _asked(infos, default, tables or {})
    allowed = _allowed(infos, asked, tables or {}, world, local_world)
    memory = memory_bytes or table_memory(device, local_world)
    replicated = {info.path for info in infos if allowed[info.table] == ["data_parallel"]}
    footprint = _footprint(infos, replicated, optimizer, tiers)
    for info in infos:
        check_memory(info, allowed[info.table], footprint, world, local_world, memory)
    constraints = _constraints(infos, allowed, world, local_world)
    topology = make_topology(world, local_world, device, memory)
    enumerator = Enumerator(topology, batch_size, constraints, footprint, frequencies or {})
    try:
        found = _planner(topology, batch_size, enumerator, constraints).plan(model, sharders(optimizer))
    except PlannerError as error:
        raise _no_room(infos, footprint, world, memory, error) from error
    plan = from_torchrec(found, infos, footprint, world, local_world)
    check_complete(plan, infos, "planner")
    check_plan(plan, infos, world, local_world, "planner")
    measured = tuple(_measured(table, frequencies or {}) for table in plan.tables)
    return plan.model_copy(update={"notes": notes_of(plan, optimizer), "tables": measured})


def repriced(plan: Plan, model: nn.Module, optimizer: TableOptimizer, tiers: TierConfig | None) -> Plan:
    """A saved plan with the bytes, tiers and notes that it has in this run. Tables that it lacks are left to
    ``check_plan``.

    Raises:
        ConfigError: the tiers do not fit the tables.
    """
    replicated = {table.path for table in plan.tables if table.sharding_type == "data_parallel"}
    priced = _footprint(find_tables(model), replicated, optimizer, tiers).priced(plan)
    return priced.model_copy(update={"notes": notes_of(priced, optimizer)})


def _footprint(
    infos: Sequence[TableInfo], replicated: Collection[str], optimizer: TableOptimizer, tiers: TierConfig | None
) -> Footprint:
    """``replicated`` tables have no tiers."""
    if tiers is None or not tiers.enabled:
        return Footprint(optimizer)
    return Footprint(optimizer, tier_plan(infos, tiers, optimizer, replicated))


def _measured(table: TablePlan, frequencies: Mapping[str, Frequency]) -> TablePlan:
    found = frequencies.get(table.path)
    if found is None:
        return table
    return table.model_copy(update={"lookups": sum(found.lookups), "head": found.head})


def _check_ranks(world: int, local_world: int) -> None:
    if local_world < 1 or world < 1 or world % local_world:
        raise PlanError(
            f"{world} ranks do not divide into machines of {local_world}",
            fix="start the same number of ranks on every machine",
        )


def _asked(infos: Sequence[TableInfo], default: str, tables: Mapping[str, str]) -> dict[str, str]:
    """The type asked for each table name, ``auto`` included."""
    names = {info.table for info in infos}
    for name in tables:
        if name not in names:
            raise PlanError(
                f"the model has no table '{name}'", where=f"sharding.tables.{name}", fix=nearest(name, names)
            )
    asked = {name: tables.get(name, default) for name in names}
    for name, kind in asked.items():
        if kind not in ("auto", *BAG_TYPES):
            raise PlanError(
                f"'{kind}' is no sharding type", where=_place(name, tables), fix=nearest(kind, ("auto", *BAG_TYPES))
            )
    return asked


def _allowed(
    infos: Sequence[TableInfo],
    asked: Mapping[str, str],
    tables: Mapping[str, str],
    world: int,
    local_world: int,
) -> dict[str, list[str]]:
    """Types the planner may choose from, by table name. Tables of one name in several collections share them."""
    allowed: dict[str, list[str]] = {}
    for info in infos:
        refused = refusals(info, world, local_world)
        possible = [kind for kind in BAG_TYPES if kind not in refused]
        kind = asked[info.table]
        if kind in refused:
            raise PlanError(
                f"table '{info.path}' cannot be {kind} on {world} ranks ({local_world} per machine): {refused[kind]}",
                where=_place(info.table, tables),
                fix=_choices(possible),
            )
        choice = _auto(info, possible, world, local_world) if kind == "auto" else [kind]
        allowed[info.table] = [k for k in allowed.get(info.table, choice) if k in choice] or ["table_wise"]
    return allowed


def _choices(possible: Sequence[str]) -> str:
    if not possible:
        return f"make its dim a multiple of {COLUMN_STEP}"
    return f"choose one of {', '.join(possible)}, or auto"


def _place(name: str, tables: Mapping[str, str]) -> str:
    return f"sharding.tables.{name}" if name in tables else "sharding.default"


def _auto(info: TableInfo, possible: Sequence[str], world: int, local_world: int) -> list[str]:
    if world == 1 and "table_wise" in possible:
        return ["table_wise"]
    if info.weight_bytes <= REPLICATE_BYTES and "data_parallel" in possible:
        return ["data_parallel"]
    machines = world // local_world
    useful = [kind for kind in AUTO_TYPES if kind != "table_row_wise" or 1 < machines < world]
    chosen = [kind for kind in useful if kind in possible]
    if not chosen:
        raise PlanError(
            f"table '{info.path}' ({info.rows} x {info.dim}) cannot be cut, because its columns are no multiple of "
            f"{COLUMN_STEP}, and is too large to be replicated unasked",
            where="sharding",
            fix=f"make its dim a multiple of {COLUMN_STEP}" + (", or set it to data_parallel" if info.pooled else ""),
        )
    return chosen


def _constraints(
    infos: Sequence[TableInfo], allowed: Mapping[str, list[str]], world: int, local_world: int
) -> dict[str, ParameterConstraints]:
    constraints: dict[str, ParameterConstraints] = {}
    for info in infos:
        kinds = allowed[info.table]
        width = column_width(info.dim, column_parts(kinds[0], world, local_world))
        constraints[info.table] = ParameterConstraints(sharding_types=kinds, min_partition=width)
    return constraints


def _planner(
    topology: Topology, batch_size: int, enumerator: Enumerator, constraints: dict[str, ParameterConstraints]
) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        stats=NoopEmbeddingStats(),
        constraints=constraints,
        debug=False,
    )


def _no_room(
    infos: Sequence[TableInfo], footprint: Footprint, world: int, memory: int, error: PlannerError
) -> PlanError:
    needed = sum(footprint.shard_bytes(info.path, info.rows, info.dim) for info in infos)
    largest = max(infos, key=lambda info: info.weight_bytes)
    reason = str(error).strip().splitlines()[0]
    return PlanError(
        f"no placement of {len(infos)} tables ({needed / 1e9:.3g} GB in all, '{largest.path}' the largest) on {world} "
        f"ranks with {memory / 1e9:.3g} GB each for tables and buffers ({reason})",
        where="sharding",
        fix="use more ranks, raise sharding.memory_gb, or set sharding.default to auto",
    )
