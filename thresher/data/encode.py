"""Clean columns to rows of tables and float32: what is stored and what a model sees."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thresher.data.hashing import hash_column
from thresher.data.parse import Parsed, parse, weights_key
from thresher.data.schema import DenseFeature, Schema, SequenceFeature, SparseFeature, Table
from thresher.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a stream (Chan et al. 1983)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, values: NDArray[np.float64]) -> "Moments":
        """The moments of both."""
        if not len(values):
            return self
        n, mean = len(values), float(values.mean())
        total, delta = self.count + n, mean - self.mean
        m2 = self.m2 + float(((values - mean) ** 2).sum()) + delta**2 * self.count * n / total
        return Moments(total, self.mean + delta * n / total, m2)

    @property
    def std(self) -> float:
        """Population standard deviation; 1 for a constant, which standardises to 0."""
        return (self.m2 / self.count) ** 0.5 if self.m2 > 0 else 1.0


class Encoder:
    """Encodes tables of one schema.

    Physical columns, none of them null:

        sparse      int64 under the feature's name; ``many``: list<int64>, and list<float32> under ``<name>.weights``
        sequence    list<int64> under its name; side columns list<int64> or list<float32> under ``<name>.<side>``
        dense, label, weight    float32
        time, group             int64

    Args:
        schema: tables and features.
        vocabularies: of each ``vocabulary`` table, by name.
        moments: of each ``standard`` dense feature over the training split, by name.
    """

    def __init__(
        self, schema: Schema, vocabularies: Mapping[str, Vocabulary] = {}, moments: Mapping[str, Moments] = {}
    ) -> None:
        self.schema = schema
        self._vocabularies = vocabularies
        self._moments = moments

    def encode(self, raw: pa.Table) -> tuple[pa.Table, Parsed]:
        """n raw rows to the m encoded rows of those that follow the schema, and what parsing found.

        Raises:
            SchemaError: a column is absent, or its type can never fit its feature.
        """
        parsed = parse(raw, self.schema)
        return self.encode_parsed(parsed.table), parsed

    def encode_parsed(self, clean: pa.Table) -> pa.Table:
        """Clean rows to encoded ones."""
        columns: dict[str, pa.Array] = {}
        for feature in self.schema.features:
            values = clean.column(feature.name).combine_chunks()
            if isinstance(feature, SparseFeature):
                columns[feature.name] = self._ids(values, feature.table)
                if feature.weights:
                    columns[weights_key(feature)] = _list(clean.column(weights_key(feature)).combine_chunks())
            elif isinstance(feature, SequenceFeature):
                columns |= self._sequence(clean, feature)
            elif isinstance(feature, DenseFeature):
                columns[feature.name] = self._dense(values, feature)
            else:
                columns[feature.name] = values
        return pa.table(columns)

    def _ids(self, values: pa.Array, table: str) -> pa.Array:
        if pa.types.is_large_list(values.type):
            return _list(values, self._rows(pc.list_flatten(values), self.schema.table(table)))
        return pa.array(self._rows(values, self.schema.table(table)))

    def _rows(self, values: pa.Array, table: Table) -> NDArray[np.int64]:
        if table.ids == "index":
            return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.int64)
        if table.ids == "vocabulary":
            return self._vocabularies[table.name].encode(values)
        return hash_column(values, table.name, table.id_limit)

    def _sequence(self, clean: pa.Table, feature: SequenceFeature) -> dict[str, pa.Array]:
        columns = {feature.name: self._ids(clean.column(feature.name).combine_chunks(), feature.table)}
        for side in feature.side:
            values = clean.column(feature.key(side)).combine_chunks()
            columns[feature.key(side)] = self._ids(values, side.table) if side.table else _list(values)
        return columns

    def _dense(self, values: pa.Array, feature: DenseFeature) -> pa.Array:
        number = values.to_numpy(zero_copy_only=False).astype(np.float64)  # nulls become NaN; parsing let no other in
        if feature.transform == "log1p":
            number = np.sign(number) * np.log1p(np.abs(number))
        elif feature.transform == "standard":
            moments = self._moments[feature.name]
            number = (number - moments.mean) / moments.std
        return pa.array(np.where(np.isnan(number), feature.fill, number).astype(np.float32))


def _list(lists: pa.Array, values: NDArray[np.int64] | None = None) -> pa.Array:
    """Lists with 32-bit offsets, holding ``values`` in place of their own."""
    flat = pc.list_flatten(lists) if values is None else pa.array(values)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
