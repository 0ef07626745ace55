"""Rows in memory, given alike to every contestant."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from thresher.data.batch import Batch
from thresher.data.dataset import Dataset
from thresher.data.reader import Reader
from thresher.data.schema import Schema


@dataclass(frozen=True)
class Rows:
    """N rows of sparse features with one id each, floats, and one label.

    Attributes:
        ids: [F, N] int64, by the schema's sparse features.
        floats: [N, n] float32.
        labels: [N] float32.
    """

    schema: Schema
    ids: Tensor
    floats: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def take(self, rows: Tensor) -> "Rows":
        """The rows whose numbers are given."""
        return Rows(self.schema, self.ids[:, rows].contiguous(), self.floats[rows], self.labels[rows])

    def batches(self, size: int, order: Tensor) -> Iterator["Rows"]:
        """Batches of ``size`` rows in the order given; the last one may be smaller."""
        for start in range(0, order.numel(), size):
            yield self.take(order[start : start + size])

    def batch(self) -> Batch:
        """All rows as our models take them."""
        fields, rows = self.ids.shape
        keys = [feature.name for feature in self.schema.sparse]
        ids = KeyedJaggedTensor(keys, self.ids.flatten(), lengths=torch.ones(fields * rows, dtype=torch.int32))
        zeros = torch.zeros(rows, dtype=torch.int64)
        weight = torch.ones(rows)
        return Batch(zeros, zeros, self.floats, ids, {}, self.labels.unsqueeze(1), weight, zeros, zeros)

    def columns(self) -> dict[str, Tensor]:
        """All rows as FuxiCTR's models take them: contiguous columns by name."""
        named = {feature.name: ids for feature, ids in zip(self.schema.sparse, self.ids, strict=True)}
        floats = self.floats.T.contiguous()
        named |= {feature.name: column for feature, column in zip(self.schema.dense, floats, strict=True)}
        return named | {self.schema.labels[0].name: self.labels}


def flat_schema(tables: dict[str, int], floats: int) -> Schema:
    """One sparse feature a table, of one id; ``floats`` dense features; a label."""
    return Schema.model_validate(
        {
            "name": "flat",
            "tables": [{"name": name, "rows": rows, "ids": "index"} for name, rows in tables.items()],
            "features": [
                *({"kind": "sparse", "name": name, "table": name} for name in tables),
                *({"kind": "dense", "name": f"I{i + 1}"} for i in range(floats)),
                {"kind": "label", "name": "label"},
            ],
        }
    )


def synthetic(total_rows: int, count: int, seed: int) -> Rows:
    """Criteo's shape: 26 tables of equal size with ``total_rows`` together, ids spread log-uniformly, 13 floats."""
    maker = torch.Generator().manual_seed(seed)
    limit = total_rows // 26
    spread = torch.rand(26, count, generator=maker, dtype=torch.float64)
    ids = (torch.tensor(float(limit), dtype=torch.float64) ** spread).long() % limit
    floats = torch.randn(count, 13, generator=maker)
    labels = (torch.rand(count, generator=maker) < 0.25).float()
    return Rows(flat_schema({f"C{i + 1}": limit for i in range(26)}, 13), ids, floats, labels)


def loaded(dataset: Dataset, split: str) -> Rows:
    """A split of a prepared data set, its features of one id and its floats; features of many ids are left out."""
    schema = dataset.schema
    single = [feature for feature in schema.sparse if not feature.many]
    reader = Reader(dataset, split, batch_size=4096, shuffle=False, prefetch=0)
    ids, floats, labels = [], [], []
    for batch in reader.sweep():
        counted = batch.weight > 0
        ids.append(torch.stack([batch.sparse[feature.name].values()[counted] for feature in single]))
        floats.append(batch.dense[counted])
        labels.append(batch.labels[counted, 0])
    reader.close()
    flat = Schema(
        name=schema.name,
        tables=tuple(schema.table(name) for name in dict.fromkeys(feature.table for feature in single)),
        features=(*single, *schema.dense, schema.labels[0]),
    )
    return Rows(flat, torch.cat(ids, dim=1), torch.cat(floats), torch.cat(labels))
