"""libsvm (svmlight) text: ``label index:value index:value ...  # comment`` a line; ``qid:N`` may follow the label.

One feature, ``index``, holds the indices of a row with their values as weights: a table's row is a feature's weight
vector, and pooling by weighted sum is the linear model that such files are written for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from thresher.data.quarantine import BadRow
from thresher.data.recipes.base import Chunk, divide
from thresher.data.recipes.from_files import HeldOut
from thresher.data.schema import Group, Label, Schema, SparseFeature, Table
from thresher.data.sources import Lines, choose_files, read_lines
from thresher.errors import DataError

_NUMBER = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
_LABEL, _PAIR, _QUERY = rf"^{_NUMBER}$", rf"^[0-9]{{1,18}}:{_NUMBER}$", r"^qid:[0-9]{1,18}$"

Mask = NDArray[np.bool_]


class LibSvm(HeldOut):
    """Rows of the files, split at random by a hash of the line number.

    Attributes:
        features: number of indices, counted from 0 (an index of ``features`` or more is a bad row); 0 takes the largest
            index in the files plus 1.
        task: ``binary`` or ``regression``.
        positive_above: ``binary`` only: the label is 1 above this; None takes labels 0 and 1, or -1 and 1.
    """

    recipe: ClassVar[str] = "libsvm"
    summary: ClassVar[str] = "libsvm text 'label index:value ...'"

    features: int = Field(default=0, ge=0)
    task: Literal["binary", "regression"] = "binary"
    positive_above: float | None = None

    def data_schema(self) -> Schema:
        return Schema(
            name="libsvm",
            tables=(Table(name="index", rows=self.features or self._largest + 1, ids="index"),),
            features=(
                Label(name="label", task=self.task),
                SparseFeature(name="index", table="index", many=True, weights="value"),
                *([Group(name="group")] if self._queries else []),
            ),
        )

    def inputs(self) -> tuple[Path, ...]:
        return choose_files(self.source, ("*.libsvm*", "*.svm*", "*.svmlight*"), "libsvm file")

    def chunks(self) -> Iterator[Chunk]:
        for number, path in enumerate(self.inputs()):
            for lines in read_lines(path):
                rows = _parse(lines, str(path), self._queries)
                columns = {"label": self._label(rows.label), "index": rows.index, "value": rows.value}
                table = pa.table(columns | ({"group": rows.query} if self._queries else {}))
                chunk = Chunk("train", table, str(path), rows.numbers, rows.bad)
                yield from divide(chunk, self.at_random(number, rows.numbers))

    def _label(self, label: pa.Array) -> pa.Array:
        if self.task == "regression":
            return label
        if self.positive_above is None:
            return pc.if_else(pc.equal(label, -1.0), 0.0, label)
        return pc.greater(label, self.positive_above).cast(pa.int8())

    @cached_property
    def _largest(self) -> int:
        largest = -1
        for path in self.inputs():
            for lines in read_lines(path):
                rows = _parse(lines, str(path), self._queries)
                largest = max(largest, pc.max(pc.list_flatten(rows.index)).as_py() or 0 if len(rows.index) else -1)
        if largest < 0:
            raise DataError("no line is 'label index:value ...'", where=str(self.inputs()[0]), fix="give a libsvm file")
        return largest

    @cached_property
    def _queries(self) -> bool:
        """Whether the first rows carry ``qid``; then all must."""
        first = next(lines for lines in read_lines(self.inputs()[0]) if len(lines.numbers) or lines.bad)
        return bool(pc.any(pc.match_substring_regex(first.texts(), r"^\S+\s+qid:")).as_py())


@dataclass(frozen=True)
class _Rows:
    """n parsed lines: numbers in the file, labels, lists of indices and values, query ids (0 without queries)."""

    numbers: NDArray[np.int64]
    label: pa.Array
    index: pa.Array
    value: pa.Array
    query: pa.Array
    bad: tuple[BadRow, ...]


def _parse(lines: Lines, file: str, queries: bool) -> _Rows:
    texts = pc.utf8_trim_whitespace(pc.replace_substring_regex(lines.texts(), r"#.*$", ""))
    words = pc.utf8_split_whitespace(texts)
    counts = pc.list_value_length(words).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    flat = words.flatten()
    fits = np.where(place == 0, _matches(flat, _LABEL), _matches(flat, _PAIR))
    if queries:
        fits = np.where(place == 1, _matches(flat, _QUERY), fits)
    wrong = np.bincount(row[~fits], minlength=len(counts)) > 0
    comment = pc.equal(texts, "").to_numpy(zero_copy_only=False)
    short = (counts < 1 + queries) & ~comment
    good = ~(wrong | short | comment)
    bad = _bad(lines, file, (wrong | short) & ~comment, flat, ~fits, row)
    use = good[row]
    pairs = pc.extract_regex(flat.filter(pa.array(use & (place > queries))), r"^(?P<index>[0-9]+):(?P<value>.*)$")
    offsets = np.concatenate([[0], np.cumsum(counts[good] - 1 - queries)]).astype(np.int32)
    index = pa.ListArray.from_arrays(pa.array(offsets), pc.struct_field(pairs, "index").cast(pa.int64()))
    value = pa.ListArray.from_arrays(pa.array(offsets), _floats(pc.struct_field(pairs, "value")))
    label = _floats(flat.filter(pa.array(use & (place == 0))))
    return _Rows(
        lines.numbers[good], label, index, value, _query(flat, use & (place == 1), queries), (*lines.bad, *bad)
    )


def _matches(words: pa.Array, pattern: str) -> Mask:
    return np.asarray(pc.match_substring_regex(words, pattern).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _floats(words: pa.Array) -> pa.Array:
    return pc.utf8_ltrim(words, "+").cast(pa.float64())


def _query(flat: pa.Array, chosen: Mask, queries: bool) -> pa.Array:
    if not queries:
        return pa.array([], pa.int64())
    return pc.utf8_slice_codeunits(flat.filter(pa.array(chosen)), 4).cast(pa.int64())


def _bad(
    lines: Lines, file: str, marked: Mask, flat: pa.Array, wrong: Mask, row: NDArray[np.int64]
) -> tuple[BadRow, ...]:
    """Marked lines, each with its first wrong word."""
    at = np.flatnonzero(wrong)
    first = dict(zip(row[at[::-1]].tolist(), flat.take(pa.array(at[::-1])).to_pylist(), strict=True))
    reasons = [
        f"line: {first[i]!r} is no label, index:value or qid:N in its place" if i in first else "line: qid is missing"
        for i in np.flatnonzero(marked).tolist()
    ]
    raw = lines.take(marked).as_bad(file, "")
    return tuple(BadRow(file, line.row, reason, line.raw) for line, reason in zip(raw, reasons, strict=True))
