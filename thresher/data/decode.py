"""One row group to one block, and every fault of its values found on the way, a column at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from thresher.data.block import Array, Block, Lists
from thresher.data.columns import Column


@dataclass(frozen=True)
class Fault:
    """A value that the schema forbids.

    Attributes:
        row: the row within the row group.
        reason: names the column, its table, the value and what is allowed; ``{place}`` stands for the row.
    """

    row: int
    reason: str


class Decoder:
    """Turns row groups of one schema into blocks."""

    def __init__(self, columns: tuple[Column, ...]) -> None:
        self._ids, self._floats, self._ints = (
            [c for c in columns if c.role == role and not c.ragged] for role in ("id", "float", "int")
        )
        self._lists = [c for c in columns if c.ragged]
        small = all(c.table is None or c.table.id_limit <= 1 << 31 for c in columns)
        self._id_type = np.int32 if small else np.int64

    def decode(self, table: pa.Table, first: int) -> tuple[Block, list[Fault]]:
        """All rows of a row group.

        Args:
            table: the row group.
            first: row number of its first row in the split.

        Returns:
            the block, in which bad rows are void and hold the values of a good row (zeros and empty lists where there
            is none); at least one fault for each bad row.
        """
        faults: list[Fault] = []
        rows = table.num_rows
        arrays = _arrays(table)
        with np.errstate(over="ignore", invalid="ignore"):
            ids = _filled(self._ids, arrays, np.empty((len(self._ids), rows), self._id_type), faults)
            floats = _filled(self._floats, arrays, np.empty((len(self._floats), rows), np.float32), faults)
            ints = _filled(self._ints, arrays, np.empty((len(self._ints), rows), np.int64), faults)
            lists = {c.name: self._list(c, arrays[c.name], faults) for c in self._lists}
        for column in self._lists:
            if column.partner:
                _same_lengths(column, lists[column.name].lengths, lists[column.partner].lengths, faults)
        void = np.zeros(rows, dtype=np.bool_)
        if faults:
            void[[fault.row for fault in faults]] = True
            ids, floats, ints = (_mended(lines, void) for lines in (ids, floats, ints))
            lists = {name: _mended_list(column, void) for name, column in lists.items()}
        # A transposed copy writes rows; all parts fit into the second-level cache.
        ids, floats, ints = (np.ascontiguousarray(lines.T) for lines in (ids, floats, ints))
        return Block(np.arange(first, first + rows), void, ids, floats, ints, self._grouped(lists)), faults

    def _list(self, column: Column, found: pa.Array, faults: list[Fault]) -> Lists:
        ends = found.offsets.to_numpy()
        lengths = np.diff(ends).astype(np.int32)
        item = np.float32 if column.role == "float" else self._id_type
        falling = np.flatnonzero(lengths < 0)
        if len(falling):
            # No list of this column can be trusted: where one ends is where the next begins.
            row = int(falling[0])
            reason = f"{column.describe()}: list offsets {int(ends[row])}, {int(ends[row + 1])} at {{place}} decrease"
            faults += [Fault(row, reason), *(Fault(i, reason) for i in range(len(lengths)))]
            return Lists.of(np.zeros_like(lengths), {column.name: np.empty(0, item)})
        _nulls(column, found, np.arange(len(found)), faults)
        if column.max_length and lengths.max(initial=0) > column.max_length:
            for row in np.flatnonzero(lengths > column.max_length).tolist():
                reason = f"{lengths[row]} elements at {{place}} are more than max_length {column.max_length}"
                faults.append(Fault(row, f"{column.describe()}: {reason}"))
        ends = ends.astype(np.int64)
        items = found.values.slice(ends[0], ends[-1] - ends[0])
        ends -= ends[0]
        values = np.empty((1, len(items)), dtype=item)
        _filled([column], {column.name: items}, values, faults, ends)
        return Lists(lengths, ends, {column.name: values[0]})

    def _grouped(self, lists: dict[str, Lists]) -> dict[str, Lists]:
        """Columns that share lengths, which good rows and mended ones do, under one name."""
        grouped = {c.name: lists[c.name] for c in self._lists if not c.partner}
        for column in self._lists:
            if column.partner:
                grouped[column.partner].values.update(lists[column.name].values)
        return grouped


def by_row(faults: Sequence[Fault]) -> dict[int, str]:
    """The first reason found for each bad row, rows ascending."""
    first: dict[int, str] = {}
    for fault in faults:
        first.setdefault(fault.row, fault.reason)
    return dict(sorted(first.items()))


def _arrays(table: pa.Table) -> dict[str, pa.Array]:
    batches = table.to_batches()
    if len(batches) != 1:
        batches = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
    return dict(zip(table.schema.names, batches[0].columns, strict=True))


def _filled(
    columns: list[Column], arrays: dict[str, pa.Array], lines: Array, faults: list[Fault], ends: Array | None = None
) -> Array:
    """Copies columns to the lines of an array in its type, with a fault for each value that is not allowed.

    Args:
        lines: [columns, n].
        ends: where the lists end that the values belong to; None for one value a row.
    """
    for column, line in zip(columns, lines, strict=True):
        values = arrays[column.name]
        if values.null_count:
            _nulls(column, values, _rows_of(np.arange(len(values)), ends), faults)
            values = values.fill_null(False if pa.types.is_boolean(values.type) else 0)
        raw = values.to_numpy(zero_copy_only=False)
        line[:] = raw
        if raw.dtype != line.dtype and column.role != "float":
            _judge(column, raw, ends, faults)
    if not _all_good(columns, lines):
        for column, line in zip(columns, lines, strict=True):
            _judge(column, line, ends, faults)
    return lines


def _all_good(columns: list[Column], lines: Array) -> bool:
    """One pass over all lines of a kind."""
    if not columns or not lines.size or columns[0].role == "int":
        return True
    if columns[0].role == "id":
        # As unsigned numbers, negative ids are huge.
        limits = np.array([column.table.id_limit for column in columns if column.table is not None])
        return bool((lines.view(f"u{lines.dtype.itemsize}").max(axis=1) < limits).all())
    if not np.isfinite(lines).all():
        return False
    pairs = list(zip(columns, lines, strict=True))
    binary = all(((line == 0) | (line == 1)).all() for column, line in pairs if column.binary)
    return binary and all(line.min() >= 0 for column, line in pairs if column.nonnegative)


def _judge(column: Column, values: Array, ends: Array | None, faults: list[Fault]) -> None:
    """Appends a fault for each value that the column does not allow."""
    if column.table is not None:
        bad = (values < 0) | (values >= column.table.id_limit)
        verdict = f"id {{}} at {{{{place}}}} is outside 0..{column.table.id_limit - 1}"
    elif column.role == "int":
        bad = values > np.iinfo(np.int64).max
        verdict = "{} at {{place}} does not fit into int64"
    else:
        bad = ~np.isfinite(values) | (values < 0 if column.nonnegative else False)
        verdict = "{} at {{place}} is not finite" + (" and at least 0" if column.nonnegative else "")
        if column.binary:
            bad = (values != 0) & (values != 1)
            verdict = "{} at {{place}} is neither 0 nor 1"
    places = np.flatnonzero(bad)
    for place, row in zip(places.tolist(), _rows_of(places, ends).tolist(), strict=True):
        faults.append(Fault(row, f"{column.describe()}: {verdict.format(values[place])}"))


def _rows_of(places: Array, ends: Array | None) -> Array:
    return places if ends is None else np.searchsorted(ends, places, side="right") - 1


def _nulls(column: Column, values: pa.Array, rows: Array, faults: list[Fault]) -> None:
    if values.null_count:
        null = rows[values.is_null().to_numpy(zero_copy_only=False)]
        faults += [Fault(row, f"{column.describe()}: null at {{place}}") for row in null.tolist()]


def _same_lengths(column: Column, mine: Array, partner: Array, faults: list[Fault]) -> None:
    for row in np.flatnonzero(mine != partner).tolist():
        reason = f"{mine[row]} elements at {{place}}, but '{column.partner}' has {partner[row]}"
        faults.append(Fault(row, f"{column.describe()}: {reason}"))


def _replacement(void: Array) -> Array:
    return np.where(void, np.argmin(void), np.arange(len(void)))


def _mended(lines: Array, void: Array) -> Array:
    return np.zeros_like(lines) if void.all() else lines[:, _replacement(void)]


def _mended_list(lists: Lists, void: Array) -> Lists:
    if void.all():
        return Lists.of(np.zeros_like(lists.lengths), {name: column[:0] for name, column in lists.values.items()})
    return lists.take(_replacement(void))
