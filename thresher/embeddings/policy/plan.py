"""Which tables have tiers, and which: from what a user asked to data that sharding, training and commands share."""

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import Field

from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.budget import WHERE, budget_bytes, readable
from thresher.embeddings.policy.config import TierConfig, TierStorage
from thresher.embeddings.rows.tiered import HEADER_BYTES
from thresher.embeddings.rows.tiers import STORED, Tier, parse_tier, record_bytes
from thresher.embeddings.tables import FLOAT_BYTES, TableInfo
from thresher.errors import ConfigError, nearest
from thresher.settings import Settings

FLAT = (Tier.FP32,)
SMALL = "no larger than"


class TableTierPlan(Settings):
    """One table.

    Attributes:
        path, table: its name within the model, and in its collection.
        rows, dim: shape of the whole table.
        scalar, vectors: optimizer state: whether one number a row, and how many for each weight.
        levels: its tiers, lowest first.
        why_flat: why all rows stay fp32 without headers; empty for a table with tiers.
    """

    path: str
    table: str
    rows: int = Field(ge=1)
    dim: int = Field(ge=1)
    scalar: bool
    vectors: int = Field(ge=0)
    levels: tuple[Tier, ...]
    why_flat: str = ""

    @property
    def tiered(self) -> bool:
        """Whether its rows have tiers: it becomes a ``TieredTable``, any other a ``FlatTable``."""
        return not self.why_flat

    @property
    def entry(self) -> Tier:
        """Tier of a row at its first update: the lowest from int8 on, so that a row is not cut to int4 before its
        priority says anything; int4 where there is nothing else."""
        stored = [tier for tier in self.levels if tier in STORED]
        return next((tier for tier in stored if tier >= Tier.INT8), stored[-1])

    @property
    def fp32_bytes(self) -> int:
        """Bytes of weights and optimizer state without tiers."""
        return self.rows * (self.scalar + self.dim * (1 + self.vectors)) * FLOAT_BYTES

    def row_bytes(self, tier: Tier, widths: Sequence[int] = ()) -> int:
        """Bytes of one row's records in ``tier``, headers apart; ``widths`` are those of its column shards."""
        return sum(record_bytes(tier, width, self.vectors) for width in widths or (self.dim,))

    def least_bytes(self, widths: Sequence[int] = ()) -> int:
        """The fewest bytes the table can take: all rows in its lowest tier, a header for each column shard."""
        if not self.tiered:
            return self.fp32_bytes
        headers = HEADER_BYTES * max(len(widths), 1)
        return self.rows * (headers + self.row_bytes(self.levels[0], widths))


class TierPlan(Settings):
    """All tables of a model that are placed on ranks, and what they may take together.

    Attributes:
        budget_bytes: over all ranks, headers, optimizer state and flat tables included.
    """

    tables: tuple[TableTierPlan, ...]
    budget_bytes: int

    @cached_property
    def by_path(self) -> dict[str, TableTierPlan]:
        """Tables by their path in the model."""
        return {table.path: table for table in self.tables}

    @property
    def tiered(self) -> tuple[TableTierPlan, ...]:
        """Tables with tiers."""
        return tuple(table for table in self.tables if table.tiered)

    @property
    def fp32_bytes(self) -> int:
        """What all tables would take without tiers."""
        return sum(table.fp32_bytes for table in self.tables)

    def planned_bytes(self, path: str, rows: int, cols: int) -> int:
        """Bytes to expect of a [rows, cols] shard: tables with tiers share what flat ones leave of the budget."""
        table = self.by_path[path]
        full = table.fp32_bytes * rows * cols // (table.rows * table.dim)
        if not table.tiered:
            return full
        least = rows * (HEADER_BYTES + record_bytes(table.levels[0], cols, table.vectors))
        flat = sum(other.fp32_bytes for other in self.tables if not other.tiered)
        room = (self.budget_bytes - flat) / sum(other.fp32_bytes for other in self.tiered)
        return max(least, int(room * full))


def tier_plan(
    infos: Sequence[TableInfo], config: TierConfig, optimizer: TableOptimizer, replicated: Collection[str] = ()
) -> TierPlan:
    """Decides which of ``infos`` have tiers, and what they may take.

    Args:
        replicated: paths of tables that every rank holds whole: they are no part of the plan, nor of the budget.

    Raises:
        ConfigError: the budget is malformed, cannot be met or saves nothing, a name is unknown, a table cannot have its
            levels, or files are asked for that no table would use.
    """
    tables = tuple(table for table in table_plans(infos, config, optimizer) if table.path not in replicated)
    plan = TierPlan(tables=tables, budget_bytes=budget_bytes(config.budget, sum(t.fp32_bytes for t in tables)))
    least_bytes = sum(table.least_bytes() for table in tables)
    _require_saving(plan, config.budget, least_bytes)
    require_room(plan, least_bytes)
    _require_stored(plan.tiered, config.storage)
    return plan


def _require_saving(plan: TierPlan, budget: str, least_bytes: int) -> None:
    """A share above 100% is no budget, unless the headers of fp32 rows in files demand it. Bytes are a limit that small
    tables may stay below."""
    if budget.strip().endswith("%") and plan.budget_bytes > plan.fp32_bytes >= least_bytes:
        raise ConfigError(
            f"'{budget}' is more than the {readable(plan.fp32_bytes)} that the tables take without tiers",
            where=WHERE,
            fix="give at most 100%, or bytes such as 2GB for a limit that tables may stay below",
        )


def _require_stored(tables: Sequence[TableTierPlan], storage: TierStorage) -> None:
    """Who asks for files must not find all rows in memory."""
    chosen = parse_levels(storage.tiers, "tiers.storage.tiers")
    if storage.folder != Path() and not any(tier in chosen for table in tables for tier in table.levels):
        raise ConfigError(
            f"no table has rows in tiers {', '.join(storage.tiers)}, so none would live in files",
            where="tiers.storage",
            fix="name tiers of tiers.levels in tiers.storage.tiers, lower tiers.flat_below_bytes, or remove "
            "tiers.storage.folder",
        )


def table_plans(infos: Sequence[TableInfo], config: TierConfig, optimizer: TableOptimizer) -> tuple[TableTierPlan, ...]:
    """Which of ``infos`` have tiers, and which.

    A table named in ``tiers.tables`` has the tiers given there. Any other stays flat if it is protected, small, or
    would gain nothing: its width is odd, or its lowest tier with a header is no smaller than fp32. A table of fp32 rows
    is flat unless its slab is to live in a file.

    Raises:
        ConfigError: a name is unknown, or a table cannot have its levels.
    """
    _check_names([info.table for info in infos], config)
    return tuple(_planned(info, config, optimizer) for info in infos)


def require_room(plan: TierPlan, least_bytes: int) -> None:
    """Checks the budget against the fewest bytes the tables can take.

    Args:
        least_bytes: as the tables are cut: column shards have headers of their own.

    Raises:
        ConfigError: it cannot be met.
    """
    if least_bytes <= plan.budget_bytes:
        return
    full, whole = plan.fp32_bytes, sum(table.least_bytes() for table in plan.tables)
    cut = f" ({readable(least_bytes - whole)} of it because tables are cut by columns)" if least_bytes > whole else ""
    small = any(table.why_flat.startswith(SMALL) for table in plan.tables)
    lower = "lower tiers.flat_below_bytes, " if small else ""
    give = (
        "cut fewer tables by columns"
        if least_bytes > full >= whole
        else f"give {_percent_up(least_bytes, full)} or more"
    )
    most = sorted(plan.tables, key=lambda table: table.least_bytes(), reverse=True)[:3]
    needs = ", ".join(f"'{t.table}' {readable(t.least_bytes())} ({t.why_flat or _lowest(t)})" for t in most)
    raise ConfigError(
        f"{readable(plan.budget_bytes)} are {100 * plan.budget_bytes / full:.3g}% of the tables' {readable(full)}; "
        f"they cannot take less than {readable(least_bytes)}, {_percent_up(least_bytes, full)}{cut}. "
        f"Most is needed by {needs}",
        where=WHERE,
        fix=f"{give}, {lower}add lower levels to tiers.levels, "
        "protect fewer tables, "
        "or make vectors wider (a row has a header of 16 bytes)",
    )


def _percent_up(part: int, whole: int) -> str:
    """Rounded up, so that the share printed suffices."""
    return f"{-(-part * 1000 // whole) / 10:g}%"


def _lowest(table: TableTierPlan) -> str:
    return f"all {table.levels[0].name.lower()}"


def _check_names(names: Sequence[str], config: TierConfig) -> None:
    for name in config.tables:
        _require_known(name, names, f"tiers.tables.{name}")
        if name in config.protect and config.tables[name].levels != ("fp32",):
            raise ConfigError(
                f"table '{name}' is protected and has levels {', '.join(config.tables[name].levels)}",
                where=f"tiers.tables.{name}",
                fix="remove one of the two",
            )
    for name in config.protect:
        _require_known(name, names, "tiers.protect")


def _require_known(name: str, names: Sequence[str], where: str) -> None:
    if name not in names:
        raise ConfigError(f"the model has no table '{name}'", where=where, fix=nearest(name, names))


def _planned(info: TableInfo, config: TierConfig, optimizer: TableOptimizer) -> TableTierPlan:
    asked = config.tables.get(info.table)
    where = "tiers.levels" if asked is None else f"tiers.tables.{info.table}.levels"
    levels = parse_levels(config.levels if asked is None else asked.levels, where)
    table = TableTierPlan(
        path=info.path,
        table=info.table,
        rows=info.rows,
        dim=info.dim,
        scalar=optimizer.has_scalar,
        vectors=optimizer.vectors,
        levels=levels,
    )
    in_file = config.storage.folder != Path() and "fp32" in config.storage.tiers
    why_flat = _why_flat(table, info.table in config.protect, in_file)
    if asked is not None and why_flat and levels != FLAT:
        raise ConfigError(
            f"table '{info.path}' cannot have tiers: {why_flat}", where=where, fix="give it levels [fp32], or none"
        )
    if asked is None and not why_flat and info.weight_bytes <= config.flat_below_bytes:
        why_flat = f"{SMALL} {readable(config.flat_below_bytes)}"
    return table.model_copy(update={"why_flat": why_flat, "levels": FLAT if why_flat else levels})


def parse_levels(names: Sequence[str], where: str) -> tuple[Tier, ...]:
    """Tiers of these names, lowest first.

    Raises:
        ConfigError: a name is unknown, or none of the tiers holds weights.
    """
    levels = tuple(sorted({parse_tier(name, where) for name in names}))
    if not any(tier in STORED for tier in levels):
        raise ConfigError("no level holds weights", where=where, fix="add fp32, fp16, int8 or int4")
    return levels


def _why_flat(table: TableTierPlan, protected: bool, in_file: bool) -> str:
    """``in_file``: fp32 slabs live in files, which is reason enough for tiers."""
    if protected:
        return "protected"
    if table.dim % 2:
        return f"its width {table.dim} is odd"
    if table.levels == FLAT and not in_file:
        return "fp32 only"
    if table.least_bytes() >= table.fp32_bytes and not in_file:
        return f"a row of width {table.dim} would not become smaller"
    return ""
