"""Vocabularies: value to row, built from the training split, kept as Parquet beside the data.

Rows by falling count, equal counts by value, so that the same rows in any order give the same vocabulary:

    row   0 missing   1 unseen   2 most frequent   3 next ...
"""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from thresher.data.hashing import texts_coded
from thresher.data.schema import MISSING_ROW, UNSEEN_ROW, Table
from thresher.errors import DataError

_RESERVED = 2
_COMPACT_VALUES = 1 << 21


class Vocabulary:
    """The rows of one table.

    Args:
        values: distinct values in row order, the first at row 2.
        counts: how often each was seen in the training split.
    """

    def __init__(self, values: list[str], counts: list[int]) -> None:
        self.values, self.counts = values, counts
        self._array = pa.array(values, pa.large_string())
        # index_in hashes the vocabulary anew each time, in C++: worth it for columns of about as many values
        self._array_pays = len(values) / 8
        self._rows = {value: row for row, value in enumerate(values, _RESERVED)}

    @property
    def rows(self) -> int:
        """Rows in use, the two reserved ones included."""
        return len(self.values) + _RESERVED

    def encode(self, column: pa.Array) -> NDArray[np.int64]:
        """[n] strings or integers to [n] rows: 0 for null and empty, 1 for unseen values."""
        codes, distinct = texts_coded(column)
        if len(distinct) > self._array_pays:
            place = pc.index_in(pa.array(distinct, pa.large_string()), value_set=self._array)
            rows = pc.fill_null(pc.add(place.cast(pa.int64()), _RESERVED), UNSEEN_ROW).to_numpy()
            return np.where([text is None for text in distinct], MISSING_ROW, rows)[codes]
        found = (MISSING_ROW if text is None else self._rows.get(text, UNSEEN_ROW) for text in distinct)
        return np.fromiter(found, np.int64, len(distinct))[codes]

    def decode(self, rows: NDArray[np.int64]) -> list[str | None]:
        """[n] rows to values; None for the reserved rows."""
        return [self.values[row - _RESERVED] if row >= _RESERVED else None for row in rows.tolist()]

    def save(self, path: Path) -> None:
        """Writes columns value (string), row (int64), count (int64)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = np.arange(_RESERVED, self.rows)
        columns = {"value": pa.array(self.values, pa.string()), "row": rows, "count": pa.array(self.counts, pa.int64())}
        pq.write_table(pa.table(columns), path)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """What :meth:`save` wrote.

        Raises:
            DataError: the file is missing or is no vocabulary.
        """
        fix = "prepare the data set again"
        try:
            table = pq.read_table(path)
        except FileNotFoundError:
            raise DataError("no such vocabulary", where=str(path), fix=fix) from None
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"is no vocabulary: {error}", where=str(path), fix=fix) from None
        if table.column_names != ["value", "row", "count"]:
            raise DataError(f"is no vocabulary: has columns {table.column_names}", where=str(path), fix=fix)
        if table["row"].to_pylist() != list(range(_RESERVED, table.num_rows + _RESERVED)):
            raise DataError("rows are not 2, 3, 4, ...", where=str(path), fix=fix)
        return cls(table["value"].to_pylist(), table["count"].to_pylist())


class VocabularyBuilder:
    """Counts the values of one table over a stream of columns. Memory: the distinct values, and a bounded rest."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._parts: list[pl.DataFrame] = []
        self._pending = 0

    def add(self, column: pa.Array) -> None:
        """Counts a column of raw ids."""
        codes, distinct = texts_coded(column)
        counts = np.bincount(codes, minlength=len(distinct))
        columns = {"value": pl.Series(distinct, dtype=pl.String), "count": pl.Series(counts, dtype=pl.Int64)}
        seen = pl.DataFrame(columns).drop_nulls().filter(pl.col("count") > 0)
        self._parts.append(seen)
        self._pending += len(seen)
        if self._pending > _COMPACT_VALUES:
            self._parts = [self._totals()]
            self._pending = 0

    def _totals(self) -> pl.DataFrame:
        empty = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
        return pl.concat([empty, *self._parts]).group_by("value").agg(pl.col("count").sum())

    def build(self) -> Vocabulary:
        """Values seen at least ``min_count`` times, the most frequent ones where rows do not suffice for all."""
        kept = self._totals().filter(pl.col("count") >= self._table.min_count)
        kept = kept.sort("count", "value", descending=[True, False]).head(max(self._table.rows - _RESERVED, 0))
        return Vocabulary(kept["value"].to_list(), kept["count"].to_list())
