"""Rows made from their numbers: any amount, the same in any order, with a structure that is known.

Row r draws everything from hashes of (seed, column, r). Its label is 1 with probability sigmoid(z), where

    z = bias + first_order * mean of one effect an id and a float        (what LR learns)
             + pairwise    * mean of <u(id of field 2i), u(id of field 2i+1)> / sqrt(K)     (what FM learns)
             + affinity    * mean over histories of sum_t <u(h_t), u(target)> / sqrt(K * length)    (what DIN learns)

with every "mean" a sum over the square root of the number of terms, so that the three strengths are the standard
deviations of their parts. Effects and the vectors u (K signs) are hashes of the id: no table is kept. The AUC of z
itself, which no model can beat, stands in the facts as ``bayes_auc``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from thresher.data.hashing import mix, uniform
from thresher.data.recipes.base import SPLITS, Chunk, Recipe, whole
from thresher.data.schema import DenseFeature, Group, Label, Schema, SequenceFeature, SparseFeature, Table, Time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_SIGNS = 16
_BINS = 1 << 16
_BAYES_ROWS = 1 << 18
_START_S = 1_700_000_000


class Synthetic(Recipe):
    """Options.

    Attributes:
        rows: rows of all splits together.
        valid, test: shares of the rows; splits are consecutive.
        sparse: fields of one id, ``sparse_0`` ..., each with its own table.
        many: fields of 0 to ``many_length`` ids, ``many_0`` ..., each with its own table.
        many_length: longest list of a ``many`` field.
        dense: standard normal floats, ``dense_0`` ....
        sequences: histories ``history_0`` ...; ``history_i`` holds 0 to ``sequence_length`` ids of the table of its
            target, ``sparse_i``.
        sequence_length: longest history.
        table_rows: rows of every table.
        zipf: exponent of the ids' frequencies; 0 is uniform.
        bias: log-odds of the label where everything else cancels.
        first_order, pairwise, affinity: standard deviations of the planted parts of the log-odds.
        seed: another seed, other data of the same kind.
        chunk_rows: rows made at a time; does not change them.
    """

    recipe: ClassVar[str] = "synthetic"
    summary: ClassVar[str] = "generated rows of any number with Zipf ids and a planted structure"

    rows: int = Field(default=100_000, ge=10)
    valid: float = Field(default=0.1, ge=0, lt=0.5)
    test: float = Field(default=0.1, ge=0, lt=0.5)
    sparse: int = Field(default=8, ge=1)
    many: int = Field(default=1, ge=0)
    many_length: int = Field(default=5, ge=1)
    dense: int = Field(default=4, ge=0)
    sequences: int = Field(default=1, ge=0)
    sequence_length: int = Field(default=20, ge=1)
    table_rows: int = Field(default=10_000, ge=2)
    zipf: float = Field(default=1.05, ge=0, le=3)
    bias: float = -1.0
    first_order: float = Field(default=1.0, ge=0)
    pairwise: float = Field(default=1.0, ge=0)
    affinity: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0)
    chunk_rows: int = Field(default=1 << 16, ge=1, exclude=True)

    @model_validator(mode="after")
    def _targets(self) -> "Synthetic":
        if self.sequences > self.sparse:
            raise ValueError(f"{self.sequences} sequences need as many sparse fields as targets, not {self.sparse}")
        return self

    def data_schema(self) -> Schema:
        """Ids index their tables as they are."""
        single = [f"sparse_{i}" for i in range(self.sparse)]
        lists = [f"many_{i}" for i in range(self.many)]
        histories = (
            SequenceFeature(name=f"history_{i}", table=f"sparse_{i}", max_length=self.sequence_length)
            for i in range(self.sequences)
        )
        return Schema(
            name="synthetic",
            tables=tuple(Table(name=name, rows=self.table_rows, ids="index") for name in (*single, *lists)),
            features=(
                *(SparseFeature(name=name, table=name) for name in single),
                *(SparseFeature(name=name, table=name, many=True) for name in lists),
                *histories,
                *(DenseFeature(name=f"dense_{i}") for i in range(self.dense)),
                Label(name="label"),
                Time(name="time"),
                Group(name="group"),
            ),
        )

    def chunks(self) -> Iterator[Chunk]:
        """The splits one after the other."""
        held = [round(self.rows * share) for share in (self.valid, self.test)]
        edges = [0, self.rows - sum(held), self.rows - held[1], self.rows]
        for split, (begin, end) in zip(SPLITS, pairwise(edges), strict=True):
            for start in range(begin, end, self.chunk_rows):
                row = np.arange(start, min(start + self.chunk_rows, end))
                yield whole(split, self._table(row), "synthetic", start + 1)

    def facts(self) -> dict[str, Any]:
        """``bayes_auc``: expected AUC of the true probabilities over (at most 262,144 of) the last rows."""
        positive, negative = np.zeros(_BINS), np.zeros(_BINS)
        first = self.rows - min(self.rows, _BAYES_ROWS)
        for start in range(first, self.rows, self.chunk_rows):
            row = np.arange(start, min(start + self.chunk_rows, self.rows))
            chance = 1 / (1 + np.exp(-self._logit(self._features(row))))
            bins = (chance * _BINS).astype(np.int64).clip(0, _BINS - 1)
            positive += np.bincount(bins, chance, _BINS)
            negative += np.bincount(bins, 1 - chance, _BINS)
        below = np.cumsum(negative) - negative / 2
        return {"bayes_auc": float((positive * below).sum() / (positive.sum() * negative.sum()))}

    def _table(self, row: Ints) -> pa.Table:
        drawn = self._features(row)
        chance = 1 / (1 + np.exp(-self._logit(drawn)))
        return pa.table(
            {f"sparse_{i}": ids for i, ids in enumerate(drawn.sparse)}
            | {f"many_{i}": lists.array() for i, lists in enumerate(drawn.many)}
            | {f"history_{i}": lists.array() for i, lists in enumerate(drawn.histories)}
            | {f"dense_{i}": values for i, values in enumerate(drawn.dense)}
            | {"label": (self._uniform(row, "label") < chance).astype(np.float32)}
            | {"time": _START_S + row, "group": drawn.sparse[0]}
        )

    def _features(self, row: Ints) -> "_Drawn":
        """Every feature's values for [n] row numbers."""
        return _Drawn(
            sparse=[self._ids(row, f"sparse_{i}", f"sparse_{i}") for i in range(self.sparse)],
            many=[self._lists(row, f"many_{i}", f"many_{i}", self.many_length) for i in range(self.many)],
            histories=[
                self._lists(row, f"history_{i}", f"sparse_{i}", self.sequence_length) for i in range(self.sequences)
            ],
            dense=[self._normal(row, f"dense_{i}") for i in range(self.dense)],
        )

    def _normal(self, row: Ints, column: str) -> Floats:
        """[n] standard normal values (Box and Muller 1958)."""
        radius = np.sqrt(-2 * np.log1p(-self._uniform(row, column)))
        return np.asarray(radius * np.cos(2 * np.pi * self._uniform(row, f"{column}:angle")), dtype=np.float64)

    def _uniform(self, counter: Ints, column: str) -> Floats:
        return uniform(counter, f"{self.seed}:{column}")

    def _ids(self, counter: Ints, column: str, table: str) -> Ints:
        """Zipf ids: the inverse of a bounded Pareto distribution, then scattered so that frequent ids are not
        neighbours.
        """
        u, n, s = self._uniform(counter, column), float(self.table_rows + 1), 1.0 - self.zipf
        rank = n**u if abs(s) < 1e-9 else ((n**s - 1.0) * u + 1.0) ** (1.0 / s)
        rank_number = np.clip(rank.astype(np.int64) - 1, 0, self.table_rows - 1)
        shift = int(mix(np.zeros(1, np.int64), f"{self.seed}:{table}:shift")[0]) % self.table_rows
        return (rank_number * _coprime(self.table_rows) + shift) % self.table_rows

    def _lists(self, row: Ints, column: str, table: str, longest: int) -> "_Lists":
        lengths = (self._uniform(row, f"{column}:length") * (longest + 1)).astype(np.int64)
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return _Lists(lengths, self._ids(np.repeat(row, lengths) * longest + within, column, table))

    def _logit(self, drawn: "_Drawn") -> Floats:
        """[n] log-odds."""
        first = [self._effect(ids, f"sparse_{i}") for i, ids in enumerate(drawn.sparse)]
        first += [lists.reduce(self._effect(lists.values, f"many_{i}")) for i, lists in enumerate(drawn.many)]
        vectors = [self._vector(ids, f"sparse_{i}") for i, ids in enumerate(drawn.sparse)]
        pairs = [_inner(vectors[i], vectors[i + 1]) for i in range(0, self.sparse - 1, 2)]
        near = [
            lists.reduce(_inner(self._vector(lists.values, f"sparse_{i}"), vectors[i].repeat(lists.lengths, axis=0)))
            for i, lists in enumerate(drawn.histories)
        ]
        rows = len(drawn.sparse[0])
        planted = self.first_order * _spread(first + drawn.dense, rows) + self.pairwise * _spread(pairs, rows)
        return self.bias + planted + self.affinity * _spread(near, rows)

    def _effect(self, ids: Ints, table: str) -> Floats:
        """[n] ids to [n] effects, uniform with variance 1."""
        return (uniform(ids, f"{self.seed}:{table}:effect") - 0.5) * 12**0.5

    def _vector(self, ids: Ints, table: str) -> NDArray[np.int8]:
        """[n] ids to [n, K] signs."""
        bits = mix(ids, f"{self.seed}:{table}:vector")[:, None] >> np.arange(_SIGNS, dtype=np.uint64)
        return ((bits & np.uint64(1)).astype(np.int8) * 2 - 1).astype(np.int8)


@dataclass(frozen=True)
class _Lists:
    """Ragged ids: [n] lengths and [sum of lengths] values."""

    lengths: Ints
    values: Ints

    def array(self) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(self.values))

    def reduce(self, parts: Floats) -> Floats:
        """[sum of lengths] to [n]: sum over the square root of the length; 0 for an empty list."""
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return np.bincount(rows, parts, len(self.lengths)) / np.sqrt(np.maximum(self.lengths, 1))


@dataclass(frozen=True)
class _Drawn:
    """The features of n rows."""

    sparse: list[Ints]
    many: list[_Lists]
    histories: list[_Lists]
    dense: list[Floats]


def _inner(left: NDArray[np.int8], right: NDArray[np.int8]) -> Floats:
    """Inner products of [n, K] signs over sqrt(K): [n], variance 1 between unrelated ids."""
    return np.asarray((left * right).sum(1) / _SIGNS**0.5, dtype=np.float64)


def _spread(parts: list[Floats], rows: int) -> Floats:
    """Sum over the square root of the number of parts; zeros where there is none."""
    return np.asarray(np.sum(parts, axis=0) / len(parts) ** 0.5 if parts else np.zeros(rows), dtype=np.float64)


def _coprime(n: int) -> int:
    """A multiplier that permutes 0..n-1 and throws neighbours far apart: near n times the golden ratio."""
    factor = max(round(n * 0.6180339887), 1)
    while np.gcd(factor, n) != 1:
        factor += 1
    return factor
