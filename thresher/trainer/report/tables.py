"""The tables of a report as rows of text."""

import math
from dataclasses import dataclass

from thresher.data.schema import Feature, SequenceFeature, SparseFeature
from thresher.sharding.plan import TablePlan
from thresher.trainer.report.files import Record
from thresher.trainer.report.run import Run
from thresher.trainer.report.units import ABSENT, count, metric, size


@dataclass(frozen=True)
class Tile:
    """A figure of the headline; ``strong`` for the one that matters."""

    label: str
    value: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class FieldRow:
    """A feature of the data. ``filled`` and ``missing`` are shares, NaN where they are not known."""

    name: str
    kind: str
    table: str
    ids: str
    rows: str
    dim: str
    distinct: str
    filled: float
    missing: float


@dataclass(frozen=True)
class Grid:
    """A table: a head, and rows of as many cells."""

    head: list[str]
    rows: list[list[str]]


def tiles(run: Run) -> list[Tile]:
    """The headline."""
    name, best, held = run.metric, run.best, run.held_out
    found = []
    if held is not None:
        told = f"{count(held['rows'])} held-out rows"
        found.append(Tile(f"{title(name)}, {held['split']}", _of(held, name), told, strong=True))
    if best is not None:
        told = f"best of {len(run.evals(run.valid))}, at step {best['step']:,}"
        found.append(Tile(f"{title(name)}, {run.valid}", _of(best, name), told, strong=held is None))
    source = held or best
    if source is not None:
        others = [m for m in source["metrics"] if m != name]
        second = [m for m in others if m in ("logloss", "mae")] or others
        found += [
            Tile(f"{title(m)}, {source['split']}", _of(source, m), f"at step {source['step']:,}") for m in second[:1]
        ]
    return found + _effort(run)


def _effort(run: Run) -> list[Tile]:
    train = run.of("train")
    step, rates = (train[-1]["step"] if train else 0), sorted(r["samples_per_s"] for r in train)
    stored = sum(run.plan.bytes_of(rank) for rank in range(run.plan.world))
    median = count(rates[len(rates) // 2]) if rates else ABSENT
    tables = "1 table" if len(run.plan.tables) == 1 else f"{len(run.plan.tables)} tables"
    samples = count(train[-1]["samples"]) if train else "0"
    return [
        Tile("Samples per second", median, f"median over the run, {_ranks(run.facts.world)} on {run.facts.device}"),
        Tile("Steps", f"{step:,}", f"of {run.facts.total_steps:,}; {samples} samples"),
        Tile("Embedding tables", size(stored), f"{tables} with optimizer state, all ranks"),
        Tile("Dense parameters", count(run.facts.dense_parameters), _held(run)),
    ]


def _held(run: Run) -> str:
    stages = int(run.config.get("pipeline", {}).get("stages", 1))
    if stages > 1:
        return f"cut over pipelines of {stages} ranks"
    return (
        "sharded over ranks" if run.config.get("pipeline", {}).get("dense") == "sharded" else "replicated on every rank"
    )


def metrics_table(run: Run) -> Grid:
    """All metrics of all splits: the best validation, then the newest evaluation of each split."""
    columns = [("best " + run.valid, run.best)] if run.best else []
    columns += [("last " + split if split == run.valid else split, run.evals(split)[-1]) for split in run.splits]
    names = list(dict.fromkeys(name for _, record in columns if record for name in record["metrics"]))
    head = ["metric", *(f"{name}, step {record['step']:,}" for name, record in columns if record)]
    rows = [[title(name), *(_of(record, name) for _, record in columns if record)] for name in names]
    seen = ["rows", *(f"{record['rows']:,}" for _, record in columns if record)]
    return Grid(head, [*rows, seen])


def fields(run: Run) -> list[FieldRow]:
    """Every feature of the schema, side columns of sequences included."""
    rows: list[FieldRow] = []
    for feature in run.facts.columns.features:
        rows.append(_field(run, feature.name, _kind(feature), getattr(feature, "table", "")))
        if isinstance(feature, SequenceFeature):
            rows += [_field(run, feature.key(side), "side column", side.table) for side in feature.side]
    return rows


def _kind(feature: Feature) -> str:
    if isinstance(feature, SequenceFeature):
        return f"sequence, newest {feature.max_length}"
    return "sparse, many" if isinstance(feature, SparseFeature) and feature.many else feature.kind


def _field(run: Run, key: str, kind: str, name: str) -> FieldRow:
    distinct = run.facts.data.get("distinct_ids", {}).get(key)
    missing = run.facts.data.get("missing_share", {}).get(key, math.nan)
    if not name:
        return FieldRow(key, kind, "", "", "", "", "", math.nan, missing)
    table = run.facts.columns.table(name)
    dims = sorted({plan.dim for plan in run.plan.tables if plan.table == name})
    return FieldRow(
        key,
        kind,
        name,
        table.ids,
        f"{table.rows:,}",
        " + ".join(map(str, dims)),
        ABSENT if distinct is None else f"{distinct:,}",
        math.nan if distinct is None else distinct / table.rows,
        missing,
    )


def plan_table(run: Run) -> Grid:
    """Every table and how it is sharded, largest first."""
    head = ["table", "sharding", "kernel", "ranks", "shards", "rows", "dim", "size"]
    return Grid(head, [_plan_row(table) for table in largest_first(run)])


def largest_first(run: Run) -> list[TablePlan]:
    """Tables of the plan by the bytes they take on all ranks."""
    return sorted(run.plan.tables, key=lambda t: (-bytes_of(t), t.table))


def bytes_of(table: TablePlan) -> int:
    """Bytes of a table on all ranks."""
    return sum(shard.bytes for shard in table.shards)


def _plan_row(table: TablePlan) -> list[str]:
    ranks = sorted({shard.rank for shard in table.shards})
    told = ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} … {ranks[-1]} ({len(ranks)})"
    sharding = table.sharding_type.replace("_", "-")
    shards = str(len(table.shards))
    rows, dim = f"{table.rows:,}", str(table.dim)
    return [table.table, sharding, table.kernel, told, shards, rows, dim, size(bytes_of(table))]


def data_table(run: Run) -> Grid:
    """Rows of each split, and the mean of each label on it."""
    rows, means = run.facts.data.get("rows", {}), run.facts.data.get("label_mean", {})
    head = ["split", "rows", *(f"mean {label}" for label in means)]
    body = [
        [split, f"{number:,}", *(metric(mean.get(split, math.nan)) for mean in means.values())]
        for split, number in rows.items()
    ]
    return Grid(head, body)


def title(name: str) -> str:
    """A metric as people write it: ``auc`` is AUC, ``like/hr@10`` is like/HR@10."""
    prefix, slash, last = name.rpartition("/")
    known = {"logloss": "Logloss", "ne": "Normalised entropy", "calibration": "Calibration"}
    return prefix + slash + known.get(last, last.upper())


def _ranks(world: int) -> str:
    return f"{world} ranks" if world > 1 else "1 rank"


def _of(record: Record, name: str) -> str:
    return metric(record["metrics"].get(name, math.nan))
