"""Whether a plan fits the tables, the ranks and the memory. Each failure names the table and the mismatch."""

from collections import Counter
from collections.abc import Sequence

from thresher.embeddings.tables import TableInfo
from thresher.errors import PlanError
from thresher.sharding.cuts import column_parts, column_width, rectangles, refusals
from thresher.sharding.footprint import Footprint
from thresher.sharding.plan import Plan, TablePlan

REPLAN = "leave sharding.plan empty to plan anew"


def check_plan(plan: Plan, infos: Sequence[TableInfo], world: int, local_world: int, source: str) -> None:
    """Refuses a plan that TorchRec could not execute for these tables on these ranks.

    Args:
        source: where the plan comes from; starts every message.

    Raises:
        PlanError: the ranks, the set of tables, a shape, a type or a shard does not fit.
    """
    if (plan.world, plan.local_world) != (world, local_world):
        raise PlanError(
            f"the plan is for {plan.world} ranks ({plan.local_world} per machine), there are {world} ({local_world})",
            where=source,
            fix=f"start {plan.world} ranks, {plan.local_world} per machine, or {REPLAN}",
        )
    check_complete(plan, infos, source)
    shapes = {info.path: info for info in infos}
    for table in plan.tables:
        _check_table(table, shapes[table.path], world, local_world, source)


def check_complete(plan: Plan, infos: Sequence[TableInfo], source: str) -> None:
    """Every table of the model stands in the plan exactly once, and no other does.

    Raises:
        PlanError: a table is missing, stands there twice, or is not the model's.
    """
    planned = Counter(table.path for table in plan.tables)
    known = Counter(info.path for info in infos)
    for path in planned | known:
        if planned[path] == known[path] == 1:
            continue
        if not known[path]:
            fault = f"the model has no table '{path}'"
        else:
            fault = f"table '{path}' stands in the plan {planned[path]} times, in the model {known[path]} times"
        raise PlanError(fault, where=source, fix=f"use each collection of tables once in a model, or {REPLAN}")


def _check_table(table: TablePlan, info: TableInfo, world: int, local_world: int, source: str) -> None:
    if (table.rows, table.dim) != (info.rows, info.dim):
        raise _misfit(
            table, f"is {table.rows} x {table.dim} in the plan, {info.rows} x {info.dim} in the model", source
        )
    refused = refusals(info, world, local_world)
    if table.sharding_type in refused:
        raise _misfit(table, f"cannot be {table.sharding_type}: {refused[table.sharding_type]}", source)
    if table.kernel != ("dense" if table.sharding_type == "data_parallel" else "fused"):
        raise _misfit(table, f"has kernel {table.kernel}, which {table.sharding_type} does not take", source)
    width = max((shard.cols for shard in table.shards), default=0) or info.dim
    if table.sharding_type == "auto" or info.dim % width:
        raise _misfit(table, f"has shards {width} columns wide of type {table.sharding_type}", source)
    given = [(s.row0, s.rows, s.col0, s.cols) for s in table.shards]
    if given != rectangles(info.rows, info.dim, table.sharding_type, world, local_world, width):
        raise _misfit(table, f"is not cut as {table.sharding_type} cuts it on {world} ranks", source)
    if not _ranks_fit(table, world, local_world):
        ranks = [shard.rank for shard in table.shards]
        raise _misfit(table, f"is placed on ranks {ranks}, which {table.sharding_type} does not allow", source)


def _misfit(table: TablePlan, fault: str, source: str) -> PlanError:
    return PlanError(f"table '{table.path}' {fault}", where=source, fix=f"correct the plan, or {REPLAN}")


def _ranks_fit(table: TablePlan, world: int, local_world: int) -> bool:
    """Row cuts need their ranks in order: over all ranks, or over the ranks of one machine."""
    ranks = [shard.rank for shard in table.shards]
    machines = [list(range(first, first + local_world)) for first in range(0, world, local_world)]
    match table.sharding_type:
        case "data_parallel" | "row_wise":
            return ranks == list(range(world))
        case "table_row_wise" | "grid_shard":
            parts = [ranks[first : first + local_world] for first in range(0, len(ranks), local_world)]
            return all(part in machines for part in parts)
        case "table_column_wise":
            return any(set(ranks) <= set(machine) for machine in machines)
    return all(rank < world for rank in ranks)


def check_memory(
    info: TableInfo, kinds: Sequence[str], footprint: Footprint, world: int, local_world: int, memory_bytes: int
) -> None:
    """Refuses a table whose largest shard alone exceeds a rank's memory under each of ``kinds``.

    Raises:
        PlanError: names the table, the bytes of its shard and what a rank has.
    """
    sizes = []
    for kind in kinds:
        width = column_width(info.dim, column_parts(kind, world, local_world))
        rows = max(n for _, n, _, _ in rectangles(info.rows, info.dim, kind, world, local_world, width))
        sizes.append(footprint.shard_bytes(info.path, rows, width))
    if min(sizes) > memory_bytes:
        raise PlanError(
            f"table '{info.path}' ({info.rows} x {info.dim}) as {' or '.join(kinds)} needs {min(sizes) / 1e9:.3g} GB "
            f"on one of {world} ranks, which have {memory_bytes / 1e9:.3g} GB each for tables",
            where="sharding",
            fix="split it over more ranks (row_wise), raise sharding.memory_gb, give it tiers, or shrink it",
        )
