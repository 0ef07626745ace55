"""Raw columns to clean ones: types settled, every row that the schema forbids taken out with its reason."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thresher.data.hashing import digest_column, is_text, require_ids
from thresher.data.schema import DenseFeature, Feature, Group, Label, Schema, SequenceFeature, SparseFeature, Weight
from thresher.errors import SchemaError, nearest

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Parsed:
    """The rows that follow the schema, and what is wrong with the others.

    Attributes:
        table: m clean rows. Ids: int64 without nulls (``index`` tables), else strings or integers with nulls for
            missing ones. Dense: float64 with nulls. Label, weight: float32; time, group: int64, no nulls. Lists (ids,
            their weights, side columns) have no null among them; a null list became an empty one.
        kept: [m] int64, positions of those rows in the raw table.
        bad: position in the raw table and first reason of each other row, in order.
    """

    table: pa.Table
    kept: NDArray[np.int64]
    bad: tuple[tuple[int, str], ...]


class _Faults:
    """The first reason of each bad row."""

    def __init__(self, rows: int) -> None:
        self.mask: Mask = np.zeros(rows, np.bool_)
        self.reasons: dict[int, str] = {}

    def add(self, bad: Mask, reason: Callable[[int], str]) -> None:
        for row in np.flatnonzero(bad & ~self.mask).tolist():
            self.reasons[row] = reason(row)
        self.mask |= bad


def parse(table: pa.Table, schema: Schema) -> Parsed:
    """Checks and cleans n raw rows (see ``recipes.base.Chunk`` for their columns).

    Sequences keep their newest ``max_length`` elements. A string column of a group feature becomes its 64-bit hash.

    Raises:
        SchemaError: a column is absent, or its type can never fit its feature.
    """
    faults = _Faults(table.num_rows)
    columns: dict[str, pa.Array] = {}
    for feature in schema.features:
        columns |= _parse(table, feature, schema, faults)
    kept = np.flatnonzero(~faults.mask)
    clean = pa.table(columns)
    if len(kept) < table.num_rows:
        clean = clean.take(pa.array(kept))
    return Parsed(clean, kept, tuple(sorted(faults.reasons.items())))


def _parse(table: pa.Table, feature: Feature, schema: Schema, faults: _Faults) -> dict[str, pa.Array]:
    if isinstance(feature, SparseFeature) and feature.many:
        return _many(table, feature, schema, faults)
    if isinstance(feature, SequenceFeature):
        return _sequence(table, feature, schema, faults)
    raw = column(table, feature.name, feature.name)
    what = f"feature '{feature.name}'"
    rows = np.arange(table.num_rows)
    if isinstance(feature, SparseFeature):
        return {feature.name: _ids(raw, what, feature.table, schema, rows, faults)}
    if isinstance(feature, DenseFeature):
        return {feature.name: _floats(raw, what, rows, faults)}
    if isinstance(feature, Label | Weight):
        return {feature.name: _target(raw, what, feature, faults)}
    if isinstance(feature, Group) and is_text(raw.type.value_type if pa.types.is_dictionary(raw.type) else raw.type):
        return {feature.name: digest_column(raw)}
    return {feature.name: _integers(raw, what, rows, faults)}


def column(table: pa.Table, name: str, feature: str) -> pa.Array:
    """One column as a single array.

    Raises:
        SchemaError: it is absent; the message names the nearest.
    """
    if name not in table.column_names:
        raise SchemaError(f"no column '{name}'", where=f"feature '{feature}'", fix=nearest(name, table.column_names))
    found = table.column(name)
    return found.combine_chunks() if found.num_chunks != 1 else found.chunk(0)


def _wrong(failed: Mask, values: pa.Array, rows: NDArray[np.int64], faults: _Faults, reason: str) -> None:
    """Marks the rows of failed values; ``reason`` has a place ``{}`` for the first failed value of the row."""
    if not failed.any():
        return
    where = np.flatnonzero(failed)
    first = dict(zip(rows[where[::-1]].tolist(), where[::-1].tolist(), strict=True))
    bad = np.zeros(len(faults.mask), np.bool_)
    bad[rows[where]] = True
    faults.add(bad, lambda row: reason.format(repr(values[first[row]].as_py())))


def _cast(raw: pa.Array, kind: type[pl.Float64] | type[pl.Int64], what: str) -> tuple[pa.Array, Mask]:
    """Numbers (empty strings null) and where a value is none."""
    if pa.types.is_dictionary(raw.type):
        raw = raw.cast(raw.type.value_type)
    if pa.types.is_timestamp(raw.type):
        raw = raw.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    series = pl.Series(pl.from_arrow(raw))
    if not (series.dtype.is_numeric() or series.dtype in (pl.String, pl.Boolean, pl.Null)):
        raise SchemaError(f"holds {raw.type}, not numbers", where=what, fix="give numbers, or strings of numbers")
    if series.dtype == pl.String:
        series = series.replace("", None)
    cast = series.cast(kind, strict=False)
    failed = series.is_not_null() & cast.is_null()
    if kind is pl.Int64 and series.dtype.is_float():
        failed |= (cast.cast(pl.Float64) != series).fill_null(False)
    return cast.to_arrow(), failed.to_numpy()


def _nulls(values: pa.Array) -> Mask:
    return np.asarray(values.is_null().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _floats(raw: pa.Array, what: str, rows: NDArray[np.int64], faults: _Faults) -> pa.Array:
    """float64 with nulls; text, NaN, and whatever float32 cannot hold is bad."""
    values, failed = _cast(raw, pl.Float64, what)
    _wrong(failed, raw, rows, faults, f"{what}: {{}} is no number")
    with np.errstate(over="ignore"):
        finite = np.isfinite(pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False).astype(np.float32))
    _wrong(~finite, raw, rows, faults, f"{what}: {{}} is not finite in float32")
    return values


def _integers(raw: pa.Array, what: str, rows: NDArray[np.int64], faults: _Faults) -> pa.Array:
    """int64 without nulls."""
    values, failed = _cast(raw, pl.Int64, what)
    _wrong(failed, raw, rows, faults, f"{what}: {{}} is no 64-bit integer")
    _wrong(_nulls(values), raw, rows, faults, f"{what}: the value is missing")
    return pc.fill_null(values, 0)


def _ids(raw: pa.Array, what: str, table: str, schema: Schema, rows: NDArray[np.int64], faults: _Faults) -> pa.Array:
    declared = schema.table(table)
    what = f"{what} of table '{table}'"
    if declared.ids != "index":
        require_ids(raw.type, what)
        return raw
    ids = _integers(raw, what, rows, faults)
    number = ids.to_numpy(zero_copy_only=False)
    outside = (number < 0) | (number >= declared.rows)
    _wrong(outside, raw, rows, faults, f"{what}: id {{}} is outside 0..{declared.rows - 1}")
    return ids


def _target(raw: pa.Array, what: str, feature: Label | Weight, faults: _Faults) -> pa.Array:
    rows = np.arange(len(raw))
    values = _floats(raw, what, rows, faults)
    _wrong(_nulls(values), raw, rows, faults, f"{what}: the value is missing")
    number = pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False)
    if isinstance(feature, Weight):
        _wrong(number < 0, raw, rows, faults, f"{what}: {{}} is negative")
    elif feature.task == "binary":
        _wrong((number != 0) & (number != 1), raw, rows, faults, f"{what}: {{}} is not 0 or 1")
    return _float32(number)


def _float32(number: NDArray[np.float64]) -> pa.Array:
    with np.errstate(over="ignore"):  # rows whose value does not fit are bad and leave
        return pa.array(number.astype(np.float32))


@dataclass(frozen=True)
class _Lists:
    lengths: NDArray[np.int64]
    values: pa.Array

    @property
    def rows(self) -> NDArray[np.int64]:
        """[number of values] the row each value stands in."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def array(self, values: pa.Array) -> pa.Array:
        """``values`` in these lengths."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)


def _lists(table: pa.Table, name: str, feature: str, newest: int = 0) -> _Lists:
    """A list column, nulls as empty lists, each cut to its ``newest`` last elements (0: whole)."""
    raw = column(table, name, feature)
    kind = raw.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise SchemaError(f"column '{name}' holds {kind}", where=f"feature '{feature}'", fix="give a list a row")
    lengths = pc.fill_null(pc.list_value_length(raw), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = pc.list_flatten(raw)
    if not newest or not (lengths > newest).any():
        return _Lists(lengths, values)
    age = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(values))  # 1 for the newest of its list
    return _Lists(np.minimum(lengths, newest), values.filter(pa.array(age <= newest)))


def _same_lengths(first: _Lists, second: _Lists, name: str, other: str, faults: _Faults) -> None:
    differ = first.lengths != second.lengths
    faults.add(
        differ, lambda row: f"feature '{name}': {first.lengths[row]} ids but {second.lengths[row]} values in '{other}'"
    )


def _many(table: pa.Table, feature: SparseFeature, schema: Schema, faults: _Faults) -> dict[str, pa.Array]:
    lists = _lists(table, feature.name, feature.name)
    what = f"feature '{feature.name}'"
    ids = _ids(lists.values, what, feature.table, schema, lists.rows, faults)
    parsed = {feature.name: lists.array(ids)}
    if feature.weights:
        weights = _lists(table, feature.weights, feature.name)
        _same_lengths(lists, weights, feature.name, feature.weights, faults)
        parsed[weights_key(feature)] = _list_floats(weights, f"{what}, weights '{feature.weights}'", faults, True)
    return parsed


def weights_key(feature: SparseFeature) -> str:
    """The column of a feature's weights in clean and encoded tables."""
    return f"{feature.name}.weights"


def _list_floats(lists: _Lists, what: str, faults: _Faults, positive: bool) -> pa.Array:
    values = _floats(lists.values, what, lists.rows, faults)
    _wrong(_nulls(values), lists.values, lists.rows, faults, f"{what}: a value is missing")
    number = pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False)
    if positive:
        _wrong(number < 0, lists.values, lists.rows, faults, f"{what}: {{}} is negative")
    return lists.array(_float32(number))


def _sequence(table: pa.Table, feature: SequenceFeature, schema: Schema, faults: _Faults) -> dict[str, pa.Array]:
    newest = feature.max_length
    lists = _lists(table, feature.name, feature.name, newest)
    ids = _ids(lists.values, f"feature '{feature.name}'", feature.table, schema, lists.rows, faults)
    parsed = {feature.name: lists.array(ids)}
    whole = _lists(table, feature.name, feature.name) if feature.side else lists
    for side in feature.side:
        key = feature.key(side)
        _same_lengths(whole, _lists(table, key, feature.name), feature.name, key, faults)
        aligned = _lists(table, key, feature.name, newest)
        what = f"side column '{key}'"
        if side.table:
            parsed[key] = aligned.array(_ids(aligned.values, what, side.table, schema, aligned.rows, faults))
        else:
            parsed[key] = _list_floats(aligned, what, faults, False)
    return parsed
