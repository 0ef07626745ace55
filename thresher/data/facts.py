"""What prepare learns about a data set on the way, for reports: one pass, memory bounded by the tables' rows."""

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thresher.data.hashing import mix
from thresher.data.schema import MISSING_ROW, Schema

_SLOTS = 1 << 24


class DistinctIds:
    """Counts distinct ids of one key: exact up to 2**24 rows, above by linear counting (Whang et al. 1990).

    Args:
        rows: ids are in 0..rows-1.
    """

    def __init__(self, rows: int) -> None:
        self._exact = rows <= _SLOTS
        self._seen = np.zeros(rows if self._exact else _SLOTS, np.bool_)

    def add(self, ids: NDArray[np.int64]) -> None:
        """Counts [n] ids."""
        self._seen[ids if self._exact else mix(ids, 0) % np.uint64(_SLOTS)] = True

    def count(self) -> int:
        """Distinct ids so far."""
        seen = int(self._seen.sum())
        if self._exact:
            return seen
        return round(-_SLOTS * math.log1p(-min(seen, _SLOTS - 1) / _SLOTS))


class Tally:
    """Rows, distinct ids, missing shares and positives of encoded tables.

    Args:
        schema: of the encoded tables.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._rows: Counter[str] = Counter()
        self._missing: Counter[str] = Counter()
        self._label_sums: dict[str, defaultdict[str, float]] = {f.name: defaultdict(float) for f in schema.labels}
        self._distinct = {key: DistinctIds(schema.table(table).id_limit) for key, table in schema.id_tables.items()}

    def add(self, split: str, encoded: pa.Table, clean: pa.Table) -> None:
        """Counts rows: ``clean`` as parsed (dense values still null where missing), ``encoded`` as stored."""
        self._rows[split] += encoded.num_rows
        for key, table in self._schema.id_tables.items():
            column = encoded.column(key).combine_chunks()
            if pa.types.is_list(column.type):
                self._missing[key] += pc.sum(pc.equal(pc.list_value_length(column), 0)).as_py() or 0
                self._distinct[key].add(pc.list_flatten(column).to_numpy())
            else:
                ids = column.to_numpy()
                if self._schema.table(table).ids != "index":
                    self._missing[key] += int((ids == MISSING_ROW).sum())
                self._distinct[key].add(ids)
        for feature in self._schema.dense:
            self._missing[feature.name] += clean.column(feature.name).null_count
        for name, sums in self._label_sums.items():
            sums[split] += float(encoded.column(name).to_numpy().sum(dtype=np.float64))

    def facts(self) -> dict[str, Any]:
        """``rows`` by split; ``distinct_ids`` and ``missing_share`` by key (for lists: share of empty ones);
        ``label_mean`` by label and split, the share of positives of a binary label.
        """
        total = max(sum(self._rows.values()), 1)
        return {
            "rows": dict(self._rows),
            "distinct_ids": {key: counter.count() for key, counter in self._distinct.items()},
            "missing_share": {key: count / total for key, count in self._missing.items()},
            "label_mean": {
                name: {split: value / self._rows[split] for split, value in sums.items() if self._rows[split]}
                for name, sums in self._label_sums.items()
            },
        }
