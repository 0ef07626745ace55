"""From a schema's tables to TorchRec's collections, and from their outputs to tensors.

Each table of the schema is one table of one collection. The trainer may replace a collection by its sharded version,
whose output is awaited at its first use and may order its keys by shard: nothing here relies on the order.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    PoolingType,
)

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.embeddings.tables import module_name
from thresher.errors import ConfigError
from thresher.zoo.blocks.ragged import first_or_zero, owners, segment_sum

Pooling = Literal["mean", "sum"]

ROW_ALIGNMENT = 4
"""FBGEMM rows are a multiple of four floats wide."""


def aligned(width: int) -> int:
    """The smallest row width that holds ``width`` floats."""
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT


def dense_device(device: torch.device) -> torch.device:
    """Where dense parameters are built: on the CPU when tables are on the meta device, for they are small and whole."""
    return torch.device("cpu") if device.type == "meta" else device


def keys_by_table(schema: Schema, keys: tuple[str, ...]) -> dict[str, list[str]]:
    """The keys that index each table, tables in the schema's order; tables without a key are left out."""
    uses = {table.name: [key for key in keys if schema.id_tables[key] == table.name] for table in schema.tables}
    return {table: used for table, used in uses.items() if used}


def weighted_keys(schema: Schema, keys: tuple[str, ...]) -> list[str]:
    """Those of ``keys`` whose ids carry weights."""
    return [feature.name for feature in schema.sparse if feature.weights and feature.name in keys]


def check_pooling(schema: Schema, keys: tuple[str, ...], pooling: Pooling) -> None:
    """Refuses the mean of weighted ids, which TorchRec does not define.

    Raises:
        ConfigError: names the weighted features.
    """
    weighted = weighted_keys(schema, keys)
    if weighted and pooling == "mean":
        raise ConfigError(
            f"the mean of weighted ids is not defined, and {', '.join(weighted)} carry weights",
            where="model.pooling",
            fix="set pooling: sum, or leave these features out of model.features",
        )


def unweighted(ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same ids without weights, which a sharded collection would otherwise send along and apply."""
    if ids.weights_or_none() is None:
        return ids
    return KeyedJaggedTensor(ids.keys(), ids.values(), lengths=ids.lengths(), offsets=ids.offsets())


class PooledTables(nn.Module):
    """One vector per sample and key: the pooled rows of its ids; zeros for no ids.

    Attributes:
        keys: keys in the order of the output.
        width: floats per row, a multiple of four.
    """

    def __init__(
        self, schema: Schema, keys: tuple[str, ...], width: int, pooling: Pooling, device: torch.device
    ) -> None:
        super().__init__()
        check_pooling(schema, keys, pooling)
        uses = keys_by_table(schema, keys)
        self.keys = [key for used in uses.values() for key in used]
        self.width = aligned(width)
        self.weighted = bool(weighted_keys(schema, keys))
        configs = [
            EmbeddingBagConfig(
                name=module_name(schema, table),
                embedding_dim=self.width,
                num_embeddings=schema.table(table).rows,
                feature_names=used,
                pooling=PoolingType.MEAN if pooling == "mean" else PoolingType.SUM,
            )
            for table, used in uses.items()
        ]
        self.collection = EmbeddingBagCollection(tables=configs, is_weighted=self.weighted, device=device)

    def forward(self, batch: Batch) -> Tensor:
        """[B, number of keys, width] float32."""
        pooled = self.collection(batch.sparse if self.weighted else unweighted(batch.sparse))
        if list(pooled.keys()) == self.keys:
            values: Tensor = pooled.values()
        else:
            by_key = pooled.to_dict()
            values = torch.cat([by_key[key] for key in self.keys], dim=1)
        return values.view(batch.size, len(self.keys), self.width)


def build_sequence_tables(
    schema: Schema, uses: dict[str, list[str]], width: int, device: torch.device
) -> EmbeddingCollection:
    """An unpooled collection: one row of ``width`` floats per id.

    Args:
        uses: the keys that index each table.
    """
    configs = [
        EmbeddingConfig(
            name=module_name(schema, table),
            embedding_dim=aligned(width),
            num_embeddings=schema.table(table).rows,
            feature_names=keys,
        )
        for table, keys in uses.items()
    ]
    return EmbeddingCollection(tables=configs, device=device)


class SequenceTables(nn.Module):
    """Tables whose rows are read one per id, with pooling on demand.

    Attributes:
        keys: every key that indexes these tables.
    """

    def __init__(
        self, schema: Schema, keys: tuple[str, ...], width: int, pooling: Pooling, device: torch.device
    ) -> None:
        super().__init__()
        check_pooling(schema, keys, pooling)
        uses = keys_by_table(schema, keys)
        self.keys = tuple(key for used in uses.values() for key in used)
        self.single = frozenset(feature.name for feature in schema.sparse if not feature.many)
        self.weighted = frozenset(weighted_keys(schema, keys))
        self.pooling = pooling
        self.collection = build_sequence_tables(schema, uses, width, device)

    def forward(self, batch: Batch) -> dict[str, JaggedTensor]:
        """By key, [number of ids, width] float32 rows, ragged like the ids."""
        rows: dict[str, JaggedTensor] = self.collection(unweighted(batch.sparse))
        return rows

    def pool(self, key: str, rows: Tensor, ids: JaggedTensor) -> Tensor:
        """[B, width]: the row of a feature of one id, the pooled rows of any other key; zeros for no ids."""
        if key in self.single and key not in self.weighted:
            return first_or_zero(rows, ids.offsets())
        weighted = rows * ids.weights()[:, None] if key in self.weighted else rows
        total = segment_sum(weighted, owners(ids.lengths(), rows.shape[0]), ids.lengths().numel())
        return total if self.pooling == "sum" else total / ids.lengths().clamp(min=1)[:, None]
