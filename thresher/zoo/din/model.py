"""DIN: the interest of a user in a target, read from histories by attention."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchrec import JaggedTensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.attention import TargetAttention
from thresher.zoo.blocks.inputs import DenseColumns
from thresher.zoo.blocks.mlp import Mlp, MlpConfig
from thresher.zoo.blocks.tables import PooledTables, SequenceTables, dense_device
from thresher.zoo.din.pairs import AttentionConfig, Pair, choose_pairs
from thresher.zoo.ranking import LogitRanker, RankerConfig


class DinConfig(RankerConfig):
    """DIN, see README.md beside this file.

    Attributes:
        dim: width of embeddings; a multiple of 4.
        attention: which sequence is attended by which target; empty for every sequence that has one target.
        unit: hidden layers of the attention's perceptron.
        softmax: whether attention weights are normalised; the paper leaves them as they are.
        mlp: hidden layers over the concatenated vectors.
    """

    name: Literal["din"] = "din"
    dim: int = Field(default=16, ge=4, multiple_of=4)
    attention: tuple[AttentionConfig, ...] = ()
    unit: MlpConfig = MlpConfig(hidden=(64,), activation="dice")
    softmax: bool = False
    mlp: MlpConfig = MlpConfig(hidden=(200, 80), activation="dice")

    def build(self, schema: Schema, device: torch.device) -> "Din":
        """The model.

        Raises:
            ConfigError, SchemaError: features, labels, pooling or ``attention`` do not fit the schema.
        """
        return Din(self, schema, device)


class Din(LogitRanker):
    """logit = mlp([embeddings, floats, attended histories]).

    Tables that an attended history or its target uses are read one row per id, all others pooled.
    """

    def __init__(self, config: DinConfig, schema: Schema, device: torch.device) -> None:
        super().__init__(schema, config.labels)
        inputs, dense_on = config.inputs(schema), dense_device(device)
        self.pairs = choose_pairs(schema, config.attention, inputs.keys)
        attended = {key for pair in self.pairs for key in pair.history}
        tables = {schema.id_tables[key] for key in attended}
        ragged = tuple(key for key in inputs.keys if schema.id_tables[key] in tables)
        pooled = tuple(key for key in inputs.keys if schema.id_tables[key] not in tables)
        self.plain = tuple(key for key in ragged if key not in attended)
        self.floats = DenseColumns(schema, inputs.dense, dense_on)
        widths = [len(pair.history) * config.dim for pair in self.pairs]
        self.attentions = nn.ModuleList(TargetAttention(width, config.unit, config.softmax) for width in widths)
        self.attentions.to(dense_on)
        width = (len(pooled) + len(self.plain)) * config.dim + self.floats.width + sum(widths)
        self.mlp = Mlp(width, config.mlp, output=len(self.labels)).to(dense_on)
        self.rows = SequenceTables(schema, ragged, config.dim, config.pooling, device)
        self.tables = PooledTables(schema, pooled, config.dim, config.pooling, device) if pooled else None

    def logits(self, batch: Batch) -> Tensor:
        """[B, labels]."""
        ragged = self.rows(batch)
        single = {key: self.rows.pool(key, ragged[key].values(), batch.sparse[key]) for key in self.plain}
        parts = list(single.values())
        if self.tables is not None:
            parts.append(self.tables(batch).flatten(1))
        if self.floats.width:
            parts.append(self.floats(batch))
        for pair, attention in zip(self.pairs, self.attentions, strict=True):
            parts.append(self._attend(pair, attention, ragged, single, batch))
        logits: Tensor = self.mlp(torch.cat(parts, dim=1), batch.weight > 0)
        return logits

    def _attend(
        self,
        pair: Pair,
        attention: nn.Module,
        ragged: dict[str, JaggedTensor],
        single: dict[str, Tensor],
        batch: Batch,
    ) -> Tensor:
        target = torch.cat([single[key] for key in pair.target], dim=1)
        history = torch.cat([ragged[key].values() for key in pair.history], dim=1)
        ids = batch.sparse[pair.history[0]]
        attended: Tensor = attention(target, history, ids.lengths(), ids.offsets(), batch.weight > 0)
        return attended
