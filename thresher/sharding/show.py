"""A plan for the eye."""

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from thresher.sharding.plan import Plan, TablePlan

UNITS = ("B", "kB", "MB", "GB", "TB")


def plan_table(plan: Plan) -> Table:
    """One line a table (largest first), and below the bytes of each rank; for a rich console or the plain one."""
    title = f"sharding plan: {plan.world} ranks, {plan.local_world} per machine; bytes include optimizer state"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    measured = any(part.lookups for part in plan.tables)
    columns = ("table", "rows x dim", "tiers", "type", "ranks", "shards", "bytes")
    for name in (*columns, "lookups", "to top 1%") if measured else columns:
        table.add_column(name, overflow="fold")
    names = Counter(part.table for part in plan.tables)
    for part in sorted(plan.tables, key=_bytes, reverse=True):
        name = part.table if names[part.table] == 1 else part.path
        shape = f"{part.rows:,} x {part.dim}"
        cells = (name, shape, _tiers(part), part.sharding_type, _ranks(part), _shapes(part), readable(_bytes(part)))
        table.add_row(*cells, *((f"{part.lookups:.3g}", f"{part.head:.0%}") if measured else ()))
    table.add_section()
    for rank in range(plan.world):
        table.add_row(f"rank {rank}", *[""] * (len(columns) - 2), readable(plan.bytes_of(rank)))
    return table


def plan_text(plan: Plan, width: int = 120) -> str:
    """The same as plain lines, with the plan's notes below."""
    console = Console(width=width, force_terminal=False, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(plan_table(plan))
    return "\n".join([capture.get().rstrip(), *(f"note: {note}" for note in plan.notes)])


def readable(size: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point: ``1536`` -> ``1.5 kB``."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


def _bytes(table: TablePlan) -> int:
    return sum(shard.bytes for shard in table.shards)


def _tiers(table: TablePlan) -> str:
    return " ".join(table.tiers) or "fp32"


def _ranks(table: TablePlan) -> str:
    ranks = sorted({shard.rank for shard in table.shards})
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def _shapes(table: TablePlan) -> str:
    """How often each shape occurs: ``3 of 25 x 16, 1 of 24 x 16``; ``whole`` where nothing is cut."""
    if all(shard.rows == table.rows and shard.cols == table.dim for shard in table.shards):
        return "whole"
    shapes = [f"{shard.rows} x {shard.cols}" for shard in table.shards]
    return ", ".join(f"{shapes.count(shape)} of {shape}" for shape in dict.fromkeys(shapes))
