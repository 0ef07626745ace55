"""Schemas, random batches, and slow fp64 twins of TorchRec's collections for the tests of models."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema

CPU = torch.device("cpu")


def shop(**changes: Any) -> Schema:
    """Two tables of items and categories, a user, tags (many ids), two floats, a history with side columns."""
    values: dict[str, Any] = {
        "name": "shop",
        "tables": [
            {"name": "users", "rows": 13},
            {"name": "items", "rows": 17, "ids": "vocabulary"},
            {"name": "categories", "rows": 7},
            {"name": "tags", "rows": 9},
        ],
        "features": [
            {"kind": "sparse", "name": "user", "table": "users"},
            {"kind": "sparse", "name": "item", "table": "items"},
            {"kind": "sparse", "name": "category", "table": "categories"},
            {"kind": "sparse", "name": "tags", "table": "tags", "many": True},
            {"kind": "dense", "name": "price"},
            {"kind": "dense", "name": "age"},
            {
                "kind": "sequence",
                "name": "history",
                "table": "items",
                "max_length": 6,
                "side": [{"name": "category", "table": "categories"}, {"name": "dwell"}],
            },
            {"kind": "label", "name": "click"},
            {"kind": "label", "name": "rating", "task": "regression"},
        ],
    }
    return Schema.model_validate(values | changes)


def batch_of(schema: Schema, size: int, seed: int = 0, empty: bool = False) -> Batch:
    """A random batch; with ``empty`` every bag and history is."""
    gen = torch.Generator().manual_seed(seed)
    single = {f.name for f in schema.sparse if not f.many}
    lengths: dict[str, Tensor] = {}
    for sequence in schema.sequences:
        drawn = torch.randint(0, sequence.max_length + 1, (size,), generator=gen)
        lengths[sequence.name] = drawn
        lengths |= {sequence.key(side): drawn for side in sequence.side}
    for key in schema.id_tables:
        if key not in lengths:
            lengths[key] = (
                torch.ones(size, dtype=torch.int64) if key in single else torch.randint(0, 4, (size,), generator=gen)
            )
    if empty:
        lengths = {key: torch.zeros_like(value) for key, value in lengths.items()}
    ids = [
        torch.randint(0, schema.table(table).rows, (int(lengths[key].sum()),), generator=gen)
        for key, table in schema.id_tables.items()
    ]
    weighted = {f.name for f in schema.sparse if f.weights}
    weights = [
        torch.rand(len(part), generator=gen) if key in weighted else torch.ones(len(part))
        for key, part in zip(schema.id_tables, ids, strict=True)
    ]
    sparse = KeyedJaggedTensor(
        keys=list(schema.id_tables),
        values=torch.cat(ids),
        lengths=torch.cat([lengths[key] for key in schema.id_tables]),
        weights=torch.cat(weights) if weighted else None,
    )
    side = {
        key: JaggedTensor(torch.rand(int(lengths[key].sum()), generator=gen), lengths=lengths[key])
        for key in schema.float_side_keys
    }
    labels = [
        (torch.rand(size, generator=gen) < 0.5).float() if label.task == "binary" else torch.randn(size, generator=gen)
        for label in schema.labels
    ]
    return Batch(
        index=torch.randperm(10_000, generator=gen)[:size],
        epoch=torch.zeros(size, dtype=torch.int64),
        dense=torch.randn(size, len(schema.dense), generator=gen),
        sparse=sparse,
        side=side,
        labels=torch.stack(labels, 1) if labels else torch.zeros(size, 0),
        weight=torch.rand(size, generator=gen) + 0.5,
        group=torch.zeros(size, dtype=torch.int64),
        time=torch.zeros(size, dtype=torch.int64),
    )


def doubled(batch: Batch) -> Batch:
    """The same batch with float64 numbers."""
    ids = batch.sparse
    weights = ids.weights_or_none()
    wide = KeyedJaggedTensor(
        ids.keys(), ids.values(), lengths=ids.lengths(), weights=None if weights is None else weights.double()
    )
    return replace(
        batch,
        dense=batch.dense.double(),
        labels=batch.labels.double(),
        weight=batch.weight.double(),
        sparse=wide,
    )


def rows_of(batch: Batch, key: str, sample: int) -> list[int]:
    """The ids of one sample."""
    ragged = batch.sparse[key]
    offsets = ragged.offsets().tolist()
    return [int(i) for i in ragged.values()[offsets[sample] : offsets[sample + 1]]]


class Lazy:
    """Stands for TorchRec's awaitable outputs: the result appears at the first attribute or item."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_result"], name)

    def __getitem__(self, key: str) -> Any:
        return Lazy(self._result[key])


class SlowBags(nn.Module):
    """Pools in fp64, a bag at a time, and returns keys in reverse order, as a sharded collection may."""

    def __init__(self, stock: EmbeddingBagCollection) -> None:
        super().__init__()
        self.configs = stock.embedding_bag_configs()
        self.weighted = stock.is_weighted()
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(bag.weight.detach().double()) for name, bag in stock.embedding_bags.items()}
        )

    def forward(self, ids: KeyedJaggedTensor) -> Any:
        keys, columns = [], []
        for config in self.configs:
            for key in config.feature_names:
                bags = [
                    self._pool(config, bag, weights)
                    for bag, weights in zip(ids[key].to_dense(), self._weights(ids[key]), strict=True)
                ]
                keys.append(key)
                columns.append(torch.stack(bags))
        keys, columns = keys[::-1], columns[::-1]
        return Lazy(KeyedTensor(keys, [c.shape[1] for c in columns], torch.cat(columns, 1)))

    def _weights(self, ids: JaggedTensor) -> list[Tensor]:
        return ids.to_dense_weights() if self.weighted else [torch.ones(len(bag)) for bag in ids.to_dense()]

    def _pool(self, config: Any, bag: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros(config.embedding_dim, dtype=torch.float64)
        for row, weight in zip(bag.tolist(), weights.tolist(), strict=True):
            total = total + weight * self.weights[config.name][row]
        return total / max(len(bag), 1) if config.pooling.name == "MEAN" else total


class SlowRows(nn.Module):
    """Looks rows up in fp64."""

    def __init__(self, stock: EmbeddingCollection) -> None:
        super().__init__()
        self.configs = stock.embedding_configs()
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(table.weight.detach().double()) for name, table in stock.embeddings.items()}
        )

    def forward(self, ids: KeyedJaggedTensor) -> Any:
        return Lazy(
            {
                key: JaggedTensor(self.weights[config.name][ids[key].values()], lengths=ids[key].lengths())
                for config in self.configs
                for key in config.feature_names
            }
        )


def slow_twin(model: nn.Module) -> nn.Module:
    """The model in fp64, its collections replaced by the slow ones; weights of tables become larger, of order one."""
    for module in list(model.modules()):
        collection = getattr(module, "collection", None)
        if isinstance(collection, EmbeddingBagCollection):
            module.collection = SlowBags(collection)
        elif isinstance(collection, EmbeddingCollection):
            module.collection = SlowRows(collection)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    return model


def table(model: nn.Module, name: str) -> Tensor:
    """The fp64 weights of a slow twin's table."""
    for module in model.modules():
        if isinstance(module, SlowBags | SlowRows):
            for config in module.configs:
                if config.name.rstrip("_") == name:
                    weights: Tensor = module.weights[config.name]
                    return weights
    raise KeyError(name)


def clear(model: nn.Module) -> None:
    """Removes gradients."""
    for parameter in model.parameters():
        parameter.grad = None


def gradients(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters, by name."""
    clear(model)
    scalar.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((left[name] - right[name]).abs().max()) if left[name].numel() else 0.0 for name in left)


def part_of(batch: Batch, samples: slice) -> Batch:
    """Some samples of a batch."""
    ids = batch.sparse
    keys = list(ids.keys())
    bags = {key: ids[key].to_dense()[samples] for key in keys}
    has_weights = ids.weights_or_none() is not None
    weights = {key: ids[key].to_dense_weights()[samples] for key in keys} if has_weights else {}
    sparse = KeyedJaggedTensor(
        keys,
        torch.cat([bag for key in keys for bag in bags[key]]),
        lengths=torch.tensor([len(bag) for key in keys for bag in bags[key]]),
        weights=torch.cat([bag for key in keys for bag in weights[key]]) if has_weights else None,
    )
    names = ("index", "epoch", "dense", "labels", "weight", "group", "time")
    return replace(batch, sparse=sparse, side={}, **{name: getattr(batch, name)[samples] for name in names})


def with_ids(batch: Batch, key: str, ids: list[list[int]]) -> Batch:
    """The batch with other ids of one key, a list a sample; without weights."""
    parts = {name: batch.sparse[name] for name in list(batch.sparse.keys())}
    values = {name: part.values() for name, part in parts.items()}
    lengths = {name: part.lengths() for name, part in parts.items()}
    values[key] = torch.tensor([row for rows in ids for row in rows], dtype=torch.int64)
    lengths[key] = torch.tensor([len(rows) for rows in ids])
    sparse = KeyedJaggedTensor(
        list(values), torch.cat(list(values.values())), lengths=torch.cat(list(lengths.values()))
    )
    return replace(batch, sparse=sparse)
