"""The sharding plan as shapes: bytes per rank stacked by table, and each table cut into its shards.

rank 0  [#### users ####][# items #]          users   +---------+      items   +---+---+
rank 1  [#### users ####][# items #]                  | rank 0  |              | 0 | 1 |
                                                      +---------+              |   |   |
                                                      | rank 1  |              +---+---+
                                                      +---------+
"""

from dataclasses import dataclass

from thresher.sharding.plan import Plan, Shard, TablePlan
from thresher.trainer.report.run import Run
from thresher.trainer.report.tables import bytes_of, largest_first
from thresher.trainer.report.units import size

MAX_BARS = 32
MAX_PICTURES = 24
MAX_SHARDS = 512
"""A picture of more shards than this shows no more; the table beside it does."""
NAMED_TABLES = 8
COPIED = "data_parallel"
WIDTH, HEIGHT = 240.0, 104.0
"""Of a table's picture, in SVG units."""
TABLE_COLOURS = ("#2f7ed8", "#f28e2b", "#17a398", "#d1495b", "#8367c7", "#8a9a5b", "#c2679f", "#b08d57")
OTHER = "#9aa3ad"


@dataclass(frozen=True)
class Segment:
    """Part of a bar: ``width`` in percent of the fullest rank."""

    width: float
    colour: str
    title: str


@dataclass(frozen=True)
class Bar:
    """What one rank holds."""

    rank: int
    colour: str
    total: str
    segments: list[Segment]


@dataclass(frozen=True)
class Rectangle:
    """A shard in a table's picture; ``label`` is empty where there is no room for it."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    label: str
    title: str


@dataclass(frozen=True)
class Picture:
    """One table that is cut into shards."""

    name: str
    caption: str
    rectangles: list[Rectangle]


def rank_colour(rank: int) -> str:
    """Neighbouring ranks are a golden angle apart on the colour wheel."""
    return f"hsl({(205 + rank * 137.508) % 360:.0f} 48% 52%)"


def table_colours(run: Run) -> dict[str, str]:
    """Colour of each of the largest tables; the rest are OTHER."""
    names = list(dict.fromkeys(table.table for table in largest_first(run)))
    return dict(zip(names, TABLE_COLOURS[:NAMED_TABLES], strict=False))


def bars(run: Run) -> list[Bar]:
    """One bar a rank, the first MAX_BARS."""
    plan, colours = run.plan, table_colours(run)
    fullest = max((plan.bytes_of(rank) for rank in range(plan.world)), default=0)
    return [_bar(run, rank, colours, max(fullest, 1)) for rank in range(min(plan.world, MAX_BARS))]


def _bar(run: Run, rank: int, colours: dict[str, str], fullest: int) -> Bar:
    held = [(table, sum(s.bytes for s in table.shards if s.rank == rank)) for table in largest_first(run)]
    segments = [
        Segment(100 * held_bytes / fullest, colours.get(table.table, OTHER), f"{table.table}: {size(held_bytes)}")
        for table, held_bytes in held
        if held_bytes
    ]
    return Bar(rank, rank_colour(rank), size(run.plan.bytes_of(rank)), segments)


def balance(plan: Plan) -> str:
    """How even the ranks are, in words."""
    held = sorted(plan.bytes_of(rank) for rank in range(plan.world))
    mean = sum(held) / len(held)
    if len(held) == 1 or not mean:
        return f"{size(held[0])} on one rank"
    if size(held[0]) == size(held[-1]):
        return f"{size(held[0])} on every rank"
    return f"{size(held[0])} to {size(held[-1])} a rank; the fullest holds {held[-1] / mean:.2f} times the mean"


def pictures(run: Run) -> list[Picture]:
    """The largest tables that can be drawn; there is nothing to draw of a table that every rank has a copy of."""
    drawable = [t for t in largest_first(run) if t.sharding_type != COPIED and len(t.shards) <= MAX_SHARDS]
    return [_picture(table) for table in drawable[:MAX_PICTURES]]


def copied(run: Run) -> list[str]:
    """Names of the tables that every rank has a copy of."""
    return [table.table for table in largest_first(run) if table.sharding_type == COPIED]


def _picture(table: TablePlan) -> Picture:
    told = f"{table.sharding_type.replace('_', '-')} · {table.rows:,} x {table.dim} · {size(bytes_of(table))}"
    shards = [shard for shard in table.shards if shard.rows and shard.cols]
    return Picture(table.table, told, [_rectangle(table, shard) for shard in shards])


def _rectangle(table: TablePlan, shard: Shard) -> Rectangle:
    width, height = WIDTH * shard.cols / table.dim, HEIGHT * shard.rows / table.rows
    rows = f"rows {shard.row0:,} to {shard.row0 + shard.rows - 1:,}"
    columns = f"columns {shard.col0} to {shard.col0 + shard.cols - 1}"
    return Rectangle(
        x=WIDTH * shard.col0 / table.dim,
        y=HEIGHT * shard.row0 / table.rows,
        width=width,
        height=height,
        colour=rank_colour(shard.rank),
        label=str(shard.rank) if width >= 18 and height >= 14 else "",
        title=f"rank {shard.rank}: {rows}, {columns}, {size(shard.bytes)}",
    )
