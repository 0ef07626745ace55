"""Which plans tables with raw ids can have."""

from collections.abc import Mapping

from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.policy.config import TierConfig
from thresher.errors import ConfigError, PlanError, nearest
from thresher.sharding.plan import Plan, TablePlan

DYNAMIC_TYPES = ("table_wise", "row_wise", "column_wise")
"""Ids reach every shard that may have their row unchanged, or so that they can be told (``RowCut``)."""


def check_dynamic(plan: Plan, dynamic: Mapping[str, DynamicTable], tiers: TierConfig | None) -> None:
    """Refuses what tables with raw ids cannot be.

    Raises:
        ConfigError: there is no such table, or rows are to be taken back by priorities that they do not have.
        PlanError: a table is placed in a way that raw ids do not survive, or a rank gets none of its rows.
    """
    names = {table.table for table in plan.tables}
    for name, config in dynamic.items():
        if name not in names:
            raise ConfigError(f"the model has no table '{name}'", where=f"dynamic.{name}", fix=nearest(name, names))
        if config.evict == "priority" and (tiers is None or not tiers.enabled):
            raise ConfigError(
                "rows have priorities only with tiers",
                where=f"dynamic.{name}.evict",
                fix="choose lru or lfu, or set tiers.budget",
            )
    for table in plan.tables:
        if table.table in dynamic:
            _check_placement(table)


def _check_placement(table: TablePlan) -> None:
    where = f"sharding.tables.{table.table}"
    if table.sharding_type not in DYNAMIC_TYPES:
        raise PlanError(
            f"table '{table.path}' has raw ids and cannot be {table.sharding_type}",
            where=where,
            fix=f"choose one of {', '.join(DYNAMIC_TYPES)}",
        )
    empty = sum(shard.rows == 0 for shard in table.shards)
    if empty:
        # Ids are sent to these shards too, which have no row to give them.
        raise PlanError(
            f"table '{table.path}' has raw ids, and {empty} of its {len(table.shards)} shards have none of its "
            f"{table.rows} rows",
            where=where,
            fix="choose table_wise, or give the table more rows",
        )
