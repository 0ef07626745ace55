"""Criteo display advertising: a label, 13 integers and 26 hashed categories a line.

Kaggle 2014 (``train.txt``: 45,840,617 lines) and the 1 TB click logs (``day_0`` .. ``day_23``) share one layout,
tab-separated without a header. Copies with commas, with a header (``Label, I1 .. I13, C1 .. C26``), with integers
written as floats, and compressed ones are read as well.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thresher.data.recipes.base import SPLITS, Chunk, divide
from thresher.data.recipes.from_files import HeldOut, IdTables, rows_of
from thresher.data.schema import DenseFeature, Label, Schema, SparseFeature, Table
from thresher.data.sources import Layout, Part, choose_files, first_line, header, read_delimited, require
from thresher.errors import SchemaError

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
_COLUMNS = ("label", *INTEGERS, *CATEGORIES)
_KNOWN_FILES = ("train.txt", "train.txt.gz", "day_*", "train.csv", "train.csv.gz")
_BUCKET_ROWS = 1024


class Criteo(IdTables, HeldOut):
    """Dense features are ``sign(x) log(1 + |x|)``, 0 where missing; each category has a table.

    Attributes:
        split: ``random``: by a hash of the row number; ``last_file``: the last file is held out, divided between valid
            and test in proportion to their shares (the 1 TB convention, where a file is a day).
        buckets: adds each integer as an id too, ``I1_bucket`` ..: x if x <= 2, else floor(log(x)^2), the rule of the
            winners of the Kaggle contest (3 Idiots, 2014).
    """

    recipe: ClassVar[str] = "criteo"
    summary: ClassVar[str] = "Criteo click logs, Kaggle and 1 TB: 13 integers, 26 categories"

    split: Literal["random", "last_file"] = "random"
    buckets: bool = False

    def data_schema(self) -> Schema:
        buckets = [f"{name}_bucket" for name in INTEGERS] if self.buckets else []
        tables = [self.table(name) for name in CATEGORIES]
        tables += [Table(name=name, rows=_BUCKET_ROWS) for name in buckets]
        return Schema(
            name="criteo",
            tables=tuple(tables),
            features=(
                Label(name="label"),
                *(DenseFeature(name=name, transform="log1p") for name in INTEGERS),
                *(SparseFeature(name=name, table=name) for name in (*CATEGORIES, *buckets)),
            ),
        )

    def inputs(self) -> tuple[Path, ...]:
        return choose_files(self.source, _KNOWN_FILES, "Criteo file")

    def chunks(self) -> Iterator[Chunk]:
        files = self.inputs()
        for number, path in enumerate(files):
            for part in _read(path):
                which = self._which(number, part.rows, number == len(files) - 1)
                yield from divide(rows_of(part, "train", self._columns(part.table)), which)

    def _which(self, file: int, rows: NDArray[np.int64], last: bool) -> NDArray[np.uint8]:
        if self.split == "random":
            return self.at_random(file, rows)
        if not last:
            return np.zeros(len(rows), np.uint8)
        held_out = max(self.valid + self.test, 1e-9)
        whole_file = self.model_copy(update={"valid": self.valid / held_out, "test": self.test / held_out})
        return np.maximum(whole_file.at_random(file, rows), SPLITS.index("valid")).astype(np.uint8)

    def _columns(self, table: pa.Table) -> pa.Table:
        if self.buckets:
            for name in INTEGERS:
                table = table.append_column(f"{name}_bucket", bucket(table.column(name).combine_chunks()))
        return table


def bucket(values: pa.Array) -> pa.Array:
    """[n] strings of numbers to [n] bucket ids: floor(x) if x <= 2, else 3 + floor(log(x)^2); null where no number."""
    number = _numbers(values)
    logs = np.floor(np.log(np.maximum(number, 2.0)) ** 2)
    ids = np.where(number > 2, 3 + logs, np.floor(number))
    known = np.isfinite(ids) & (np.abs(ids) < 2**53)
    return pa.array(np.where(known, ids, 0).astype(np.int64), mask=~known)


def _numbers(values: pa.Array) -> NDArray[np.float64]:
    """[n] floats, NaN where a value is missing or no number (the dense feature's check reports the latter)."""
    try:
        number = values.cast(pa.float64())
    except pa.ArrowInvalid:
        plain = pc.match_substring_regex(values, r"^-?[0-9]+(\.[0-9]*)?$")
        number = pc.if_else(plain, values, None).cast(pa.float64())
    return np.asarray(number.to_numpy(zero_copy_only=False), dtype=np.float64)


def _read(path: Path) -> Iterator[Part]:
    line = first_line(path)
    layout = Layout(delimiter="\t" if "\t" in line or "," not in line else ",", columns=_COLUMNS)
    if "label" in line.lower():
        layout = Layout(delimiter=layout.delimiter)
        names = _canonical(header(path, layout))
        require(path, names, _COLUMNS)
        for part in read_delimited(path, layout):
            yield Part(part.file, part.table.rename_columns(names).select(_COLUMNS), part.rows, part.bad)
        return
    if line.count(layout.delimiter) + 1 == len(_COLUMNS) - 1:
        raise SchemaError(
            f"has {len(_COLUMNS) - 1} columns, no column 'label'",
            where=str(path),
            fix="give a labelled file (train.txt, day_N); the contest's test.txt carries no labels",
        )
    yield from read_delimited(path, layout)


def _canonical(names: tuple[str, ...]) -> list[str]:
    """Header names with the case that ``_COLUMNS`` uses."""
    known = {name.lower(): name for name in _COLUMNS}
    return [known.get(name.lower(), name) for name in names]
