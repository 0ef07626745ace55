"""One row group to one block, and every fault of its values found on the way, a column at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from thresher.data.block import Array, Block, Ragged
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
        self._scalar = {
            role: [c for c in columns if c.role == role and not c.ragged] for role in ("id", "float", "int")
        }
        self._ragged = [c for c in columns if c.ragged]
        small = all(c.table is None or c.table.rows <= 1 << 31 for c in columns)
        self._id_type = np.int32 if small else np.int64

    def decode(self, table: pa.Table, first: int) -> tuple[Block, list[Fault]]:
        """All rows of a row group.

        Args:
            table: the row group.
            first: row number of its first row in the split.

        Returns:
            the block, in which bad rows are void and hold anything; one fault for each bad value of a column.
        """
        faults: list[Fault] = []
        rows = table.num_rows
        ids = np.empty((len(self._scalar["id"]), rows), dtype=self._id_type)
        floats = np.empty((len(self._scalar["float"]), rows), dtype=np.float32)
        ints = np.empty((len(self._scalar["int"]), rows), dtype=np.int64)
        for role, lines in (("id", ids), ("float", floats), ("int", ints)):
            for column, line in zip(self._scalar[role], lines, strict=True):
                _fill(column, _chunk(table, column), line, faults)
        ragged: dict[str, Ragged] = {}
        for column in self._ragged:
            ragged[column.name] = self._lists(column, _chunk(table, column), faults)
            if column.partner:
                _same_lengths(column, ragged, faults)
        void = np.zeros(rows, dtype=np.bool_)
        void[[fault.row for fault in faults]] = True
        return Block(np.arange(first, first + rows), void, ids, floats, ints, ragged), faults

    def _lists(self, column: Column, lists: pa.Array, faults: list[Fault]) -> Ragged:
        ends = lists.offsets.to_numpy()
        lengths = np.diff(ends).astype(np.int32)
        falling = np.flatnonzero(lengths < 0)
        if len(falling) or (len(ends) and ends[0] < 0):
            # No list of this column can be trusted: where one ends is where the next begins.
            row = int(falling[0]) if len(falling) else 0
            reason = f"{column.describe()}: list offsets {int(ends[row])}, {int(ends[row + 1])} at {{place}} decrease"
            faults += [Fault(i, reason) for i in range(len(lengths))]
            return Ragged.of(np.zeros_like(lengths), np.empty(0, self._item_type(column)))
        _nulls(column, lists, np.arange(len(lists)), faults)
        if column.max_length and lengths.max(initial=0) > column.max_length:
            for row in np.flatnonzero(lengths > column.max_length).tolist():
                reason = f"{lengths[row]} elements at {{place}} are more than max_length {column.max_length}"
                faults.append(Fault(row, f"{column.describe()}: {reason}"))
        items = lists.values.slice(ends[0], ends[-1] - ends[0])
        values = np.empty(len(items), dtype=self._item_type(column))
        _fill(column, items, values, faults, ends - ends[0])
        return Ragged.of(lengths, values)

    def _item_type(self, column: Column) -> Any:
        return np.float32 if column.role == "float" else self._id_type


def _chunk(table: pa.Table, column: Column) -> pa.Array:
    found = table[column.name]
    whole = found.chunk(0) if found.num_chunks == 1 else pa.concat_arrays(found.chunks)
    return whole if not isinstance(whole, pa.ChunkedArray) else whole.combine_chunks()


def _fill(column: Column, values: pa.Array, line: Array, faults: list[Fault], ends: Array | None = None) -> None:
    """Copies ``values`` to ``line`` in its type and appends a fault for each value that is not allowed.

    Args:
        ends: where the lists end that the values belong to; None for one value a row.
    """
    if values.null_count:
        _nulls(column, values, _rows_of(np.arange(len(values)), ends), faults)
        values = values.fill_null(False if pa.types.is_boolean(values.type) else 0)
    raw = values.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):
        line[:] = raw
    bad = _bad_places(column, raw, line)
    for place, row in zip(bad.tolist(), _rows_of(bad, ends).tolist(), strict=True):
        faults.append(Fault(row, f"{column.describe()}: {_verdict(column, raw[place])}"))


def _bad_places(column: Column, raw: Array, line: Array) -> Array:
    """Where the values are not allowed; one pass over good values."""
    nothing = np.empty(0, dtype=np.int64)
    if column.table is not None:
        unsigned = raw.view(f"u{raw.dtype.itemsize}")  # a negative id looks huge
        return (
            np.flatnonzero(unsigned >= column.table.rows) if unsigned.max(initial=0) >= column.table.rows else nothing
        )
    if column.role == "int":
        return np.flatnonzero(raw > np.iinfo(np.int64).max) if raw.dtype == np.uint64 else nothing
    good = np.isfinite(line)
    if column.nonnegative:
        good &= line >= 0
    return nothing if good.all() else np.flatnonzero(~good)


def _verdict(column: Column, value: Any) -> str:
    if column.table is not None:
        return f"id {value} at {{place}} is outside 0..{column.table.rows - 1}"
    if column.nonnegative and value < 0:
        return f"{value} at {{place}} is negative"
    return f"{value} at {{place}} is not finite" if column.role == "float" else f"{value} at {{place}} exceeds int64"


def _rows_of(places: Array, ends: Array | None) -> Array:
    return places if ends is None else np.searchsorted(ends, places, side="right") - 1


def _nulls(column: Column, values: pa.Array, rows: Array, faults: list[Fault]) -> None:
    if values.null_count:
        null = rows[values.is_null().to_numpy(zero_copy_only=False)]
        faults += [Fault(row, f"{column.describe()}: null at {{place}}") for row in null.tolist()]


def _same_lengths(column: Column, ragged: dict[str, Ragged], faults: list[Fault]) -> None:
    mine, partner = ragged[column.name].lengths, ragged[column.partner].lengths
    for row in np.flatnonzero(mine != partner).tolist():
        reason = f"{mine[row]} elements at {{place}}, but '{column.partner}' has {partner[row]}"
        faults.append(Fault(row, f"{column.describe()}: {reason}"))


def by_row(faults: Sequence[Fault]) -> dict[int, str]:
    """The first reason of each bad row, rows ascending."""
    first: dict[int, str] = {}
    for fault in faults:
        first.setdefault(fault.row, fault.reason)
    return dict(sorted(first.items()))
