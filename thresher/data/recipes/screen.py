"""Setting rows aside that a recipe itself cannot use, before the schema's own checks."""

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thresher.data.quarantine import BadRow
from thresher.data.sources import Part


def set_aside(part: Part, bad: NDArray[np.bool_], column: str, fault: str) -> Part:
    """``part`` without the rows that ``bad`` ([n]) marks, which become bad rows.

    Args:
        column: the column that is at fault.
        fault: what is wrong; ``{}`` stands for its value.
    """
    if not bad.any():
        return part
    rows = part.table.filter(pa.array(bad)).to_pylist()
    found = [
        BadRow(part.file, int(number), f"column '{column}': " + fault.format(repr(row[column])), _line(row))
        for number, row in zip(part.rows[bad], rows, strict=True)
    ]
    merged = tuple(sorted((*part.bad, *found), key=lambda row: row.row))
    return replace(part, table=part.table.filter(pa.array(~bad)), rows=part.rows[~bad], bad=merged)


def _line(row: dict[str, object]) -> str:
    return "\t".join("" if value is None else str(value) for value in row.values())


def need(part: Part, *columns: str) -> Part:
    """Sets rows aside that lack a value in one of ``columns``."""
    for name in columns:
        missing = part.table.column(name).is_null().to_numpy()
        part = set_aside(part, np.asarray(missing, dtype=np.bool_), name, "the value is missing")
    return part


def need_integers(part: Part, *columns: str) -> Part:
    """Sets rows aside whose ``columns`` are no integers (``5.0`` is one), and makes those int64 columns."""
    part = need(part, *columns)
    for name in columns:
        text = pl.Series(pl.from_arrow(part.table.column(name)))
        exact = text.cast(pl.Int64, strict=False)
        floats = text.cast(pl.Float64, strict=False)
        whole = floats.is_finite() & (floats.abs() < 2**53) & (floats == floats.round())
        value = exact.fill_null(pl.select(pl.when(whole).then(floats)).to_series().cast(pl.Int64, strict=False))
        part = _converted(part, name, value, "{} is no 64-bit integer")
    return part


def need_floats(part: Part, *columns: str) -> Part:
    """Sets rows aside whose ``columns`` are no finite numbers, and makes those float64 columns."""
    part = need(part, *columns)
    for name in columns:
        value = pl.Series(pl.from_arrow(part.table.column(name))).cast(pl.Float64, strict=False)
        part = _converted(part, name, pl.select(pl.when(value.is_finite()).then(value)).to_series(), "{} is no number")
    return part


def _converted(part: Part, name: str, value: pl.Series, fault: str) -> Part:
    failed = value.is_null().to_numpy()
    kept = set_aside(part, failed, name, fault)
    position = part.table.column_names.index(name)
    return replace(kept, table=kept.table.set_column(position, name, value.drop_nulls().to_arrow()))


def integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """An integer column without nulls as [n] int64."""
    return np.asarray(pc.cast(table.column(name), pa.int64()).to_numpy(), dtype=np.int64)
