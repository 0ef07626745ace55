"""A small data set with every kind of column, and its rows as Python lists."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from thresher.data.dataset import Dataset
from thresher.data.schema import Label, Schema
from thresher.data.writer import DatasetWriter

SCHEMA = Schema.model_validate(
    {
        "name": "made",
        "tables": [{"name": "users", "rows": 100}, {"name": "items", "rows": 1000}],
        "features": [
            {"kind": "sparse", "name": "user_id", "table": "users"},
            {"kind": "sparse", "name": "liked", "table": "items", "many": True, "weights": "strength"},
            {"kind": "sparse", "name": "item", "table": "items"},
            {
                "kind": "sequence",
                "name": "history",
                "table": "items",
                "max_length": 5,
                "side": [{"name": "user", "table": "users"}, {"name": "age"}],
            },
            {"kind": "dense", "name": "price"},
            {"kind": "dense", "name": "age"},
            {"kind": "label", "name": "bought"},
            {"kind": "weight", "name": "importance"},
            {"kind": "time", "name": "when"},
            {"kind": "group", "name": "session"},
        ],
    }
)

FLAT = Schema.model_validate(
    {
        "name": "flat",
        "tables": [{"name": "users", "rows": 100}],
        "features": [
            {"kind": "sparse", "name": "user_id", "table": "users"},
            {"kind": "sparse", "name": "friend_id", "table": "users"},
            {"kind": "dense", "name": "price"},
            {"kind": "label", "name": "bought"},
        ],
    }
)


def rows_of(schema: Schema, rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """Random encoded rows; float values are exact in float32."""
    rng = np.random.default_rng(seed)

    def floats(count: int) -> list[float]:
        return (rng.integers(0, 1000, count) / 8).tolist()

    def ids(limit: int, count: int) -> list[int]:
        return rng.integers(0, limit, count).tolist()

    columns: dict[str, list[Any]] = {}
    for sparse in schema.sparse:
        limit = schema.table(sparse.table).rows
        if sparse.many:
            columns[sparse.name] = [ids(limit, n) for n in rng.integers(0, 4, rows)]
            if sparse.weights:
                columns[f"{sparse.name}.weights"] = [floats(len(one)) for one in columns[sparse.name]]
        else:
            columns[sparse.name] = ids(limit, rows)
    for sequence in schema.sequences:
        lengths = rng.integers(0, sequence.max_length + 1, rows)
        columns[sequence.name] = [ids(schema.table(sequence.table).rows, n) for n in lengths]
        for side in sequence.side:
            limit = schema.table(side.table).rows if side.table else 0
            columns[sequence.key(side)] = [ids(limit, n) if limit else floats(n) for n in lengths]
    for feature in (*schema.dense, *schema.labels, schema.weight):
        if isinstance(feature, Label) and feature.task == "binary":
            columns[feature.name] = rng.integers(0, 2, rows).astype(float).tolist()
        elif feature is not None:
            columns[feature.name] = floats(rows)
    for feature in (schema.time, schema.group):
        if feature is not None:
            columns[feature.name] = ids(1 << 40, rows)
    return columns


def make(folder: Path, schema: Schema, **splits: int) -> Dataset:
    """A data set on disk with so many rows in each split."""
    writer = DatasetWriter(folder, schema, "made", {"splits": splits})
    for seed, (name, rows) in enumerate(splits.items()):
        writer.write(name, pa.table(rows_of(schema, rows, seed)))
    return writer.finish({"made": True})
