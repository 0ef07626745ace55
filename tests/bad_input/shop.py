"""A small data set, whole or damaged, and what it is to read it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.made import rows_of
from thresher.data.dataset import Dataset, hash_file
from thresher.data.reader import Reader
from thresher.data.schema import Schema
from thresher.data.writer import DatasetWriter

SCHEMA: dict[str, Any] = {
    "name": "shop",
    "tables": [{"name": "users", "rows": 50}, {"name": "items", "rows": 100}],
    "features": [
        {"kind": "sparse", "name": "user", "table": "users"},
        {"kind": "sparse", "name": "item", "table": "items"},
        {"kind": "sequence", "name": "history", "table": "items", "max_length": 5},
        {"kind": "dense", "name": "price"},
        {"kind": "label", "name": "bought"},
        {"kind": "weight", "name": "importance"},
    ],
}

ROWS = 64
Columns = dict[str, Any]


def columns(rows: int = ROWS) -> Columns:
    """Good rows of ``SCHEMA`` as Python lists."""
    return rows_of(Schema.model_validate(SCHEMA), rows)


def make(folder: Path, rows: int = ROWS) -> Path:
    """A whole data set with the splits train, valid and test."""
    writer = DatasetWriter(folder, Schema.model_validate(SCHEMA), "shop", {})
    for split in ("train", "valid", "test"):
        writer.write(split, pa.table(columns(rows)))
    writer.finish({})
    return folder


def part_of(folder: Path) -> Path:
    """The file of the training split."""
    return next((folder / "train").glob("*.parquet"))


def with_rows(change: Callable[[Columns], Columns]) -> Callable[[Path], Path]:
    """A data set whose training rows are changed behind the back of what wrote them; its manifest fits them."""

    def damage(folder: Path) -> Path:
        make(folder)
        part = part_of(folder)
        pq.write_table(pa.table(change(columns())), part)
        return _renewed_manifest(folder, part)

    return damage


def _renewed_manifest(folder: Path, part: Path) -> Path:
    metadata = pq.read_metadata(part)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    entry = {"rows": metadata.num_rows, "groups": groups, "size_bytes": part.stat().st_size}
    with_manifest(folder, lambda manifest: manifest["splits"]["train"][0].update(entry | {"xxh3_128": hash_file(part)}))
    return folder


def with_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes ``dataset.json`` of a data set."""
    manifest = json.loads((folder / "dataset.json").read_text())
    change(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


def read(folder: Path, split: str = "train") -> None:
    """Reads every row of a split."""
    reader = Reader(Dataset.open(folder), split, batch_size=16, window_rows=64, prefetch=0)
    for _ in reader.sweep():
        pass
