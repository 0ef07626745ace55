"""Schedules as text: JSON and CSV, both exact.

Both hold the shape, the number of operations of each rank, and one row per operation with the fields of
:class:`~thresher.pipeline.schedule.ops.Op`. Loading checks the form, not the sense: that is what
:mod:`thresher.pipeline.schedule.validate` is for.
"""

import csv
import io
import json
from dataclasses import astuple, fields
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Schedule, Shape
from thresher.pipeline.schedule.orders import check_shape

VERSION = 1
"""Of both formats. Files of another version are refused."""

_COLUMNS = tuple(field.name for field in fields(Op))
_SHAPE = tuple(field.name for field in fields(Shape))
_Count = Annotated[int, Field(ge=0)]
_Row = tuple[Kind, _Count, _Count, _Count, Payload | None, int, int, tuple[_Count, _Count, _Count] | None]


class _ShapeModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: int
    chunks: int
    microbatches: int
    slices: int
    slack: int
    policy: str
    split_embedding: bool
    split_head: bool
    split_backward: bool


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    shape: _ShapeModel
    columns: tuple[str, ...]
    counts: tuple[int, ...]
    ranks: tuple[tuple[_Row, ...], ...]


def to_json(schedule: Schedule) -> str:
    """One JSON object; operations are arrays in the order of ``columns``."""
    document = {
        "version": VERSION,
        "shape": dict(zip(_SHAPE, astuple(schedule.shape), strict=True)),
        "columns": _COLUMNS,
        "counts": [len(ops) for ops in schedule.ranks],
        "ranks": [[_row(op) for op in ops] for ops in schedule.ranks],
    }
    return json.dumps(document, separators=(",", ":"))


def from_json(text: str) -> Schedule:
    """The schedule that :func:`to_json` wrote.

    Raises:
        ScheduleError: no such text: damaged, cut short, or of another version.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged("JSON", f"not JSON: {error}") from None
    return _parsed(document, "JSON")


def to_csv(schedule: Schedule) -> str:
    """Two lines about the whole schedule, then a table with a line per operation, led by its rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["version", *_SHAPE, "counts"])
    writer.writerow([VERSION, *astuple(schedule.shape), " ".join(str(len(ops)) for ops in schedule.ranks)])
    writer.writerow(["rank", *_COLUMNS])
    for rank, ops in enumerate(schedule.ranks):
        writer.writerows([rank, *map(_cell, _row(op))] for op in ops)
    return text.getvalue()


def from_csv(text: str) -> Schedule:
    """The schedule that :func:`to_csv` wrote.

    Raises:
        ScheduleError: no such text: damaged, cut short, or of another version.
    """
    try:
        lines = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise _damaged("CSV", f"not CSV: {error}") from None
    if len(lines) < 3 or lines[0] != ["version", *_SHAPE, "counts"] or len(lines[1]) != len(lines[0]):
        raise _damaged("CSV", "the first two lines do not give version, shape and counts")
    version, *shape, counts = lines[1]
    numbers = counts.split()
    ranks: list[list[list[object]]] = [[] for _ in numbers]
    for number, line in enumerate(lines[3:], start=4):
        if len(line) != 1 + len(_COLUMNS) or not line[0].isdecimal() or int(line[0]) >= len(ranks):
            raise _damaged("CSV", f"line {number} is no operation of one of {len(ranks)} ranks: {','.join(line)}")
        ranks[int(line[0])].append([*line[1:5], line[5] or None, *line[6:8], line[8].split() or None])
    columns = lines[2][1:]
    whole = {"version": int(version) if version.isdecimal() else version, "columns": columns, "counts": numbers}
    return _parsed({**whole, "shape": dict(zip(_SHAPE, shape, strict=True)), "ranks": ranks}, "CSV")


def _parsed(document: object, form: str) -> Schedule:
    try:
        parsed = _Document.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(form, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if parsed.columns != _COLUMNS:
        raise _damaged(form, f"columns are {', '.join(parsed.columns)} instead of {', '.join(_COLUMNS)}")
    shape = Shape(**dict(parsed.shape))
    check_shape(shape)
    found = tuple(map(len, parsed.ranks))
    if found != parsed.counts or len(found) != shape.stages:
        raise _damaged(form, f"{found} operations by rank instead of {parsed.counts} for {shape.stages} stages")
    return Schedule(shape, tuple(tuple(Op(*row) for row in rows) for rows in parsed.ranks))


def _damaged(form: str, what: str) -> ScheduleError:
    return ScheduleError(what, where=f"{form} of a schedule", fix=f"dump it again; this is version {VERSION}")


def _row(op: Op) -> tuple[object, ...]:
    return op.kind, op.microbatch, op.chunk, op.slice, op.payload, op.peer, op.share, op.partner


def _cell(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
