"""DCN V2: explicit feature crosses of bounded degree, with a perceptron after or beside them."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.cross import CrossNet, MixtureCrossNet
from thresher.zoo.blocks.inputs import DenseColumns
from thresher.zoo.blocks.mlp import Head, Mlp, MlpConfig
from thresher.zoo.blocks.tables import PooledTables, dense_device
from thresher.zoo.ranking import LogitRanker, RankerConfig


class DcnV2Config(RankerConfig):
    """DCN V2, see README.md beside this file.

    Attributes:
        dim: width of embeddings; a multiple of 4.
        structure: ``parallel`` (logit from [crosses, perceptron]) or ``stacked`` (perceptron over the crosses).
        layers: number of cross layers; the highest degree of a cross is one more.
        cross: ``full`` (W of D x D), ``low_rank`` (U V^T) or ``mixture`` (of low-rank experts).
        rank: of U and V; unused by ``full``.
        experts: of ``mixture``.
        mlp: the deep part; no hidden layer leaves the crosses alone.
    """

    name: Literal["dcnv2"] = "dcnv2"
    dim: int = Field(default=16, ge=4, multiple_of=4)
    structure: Literal["parallel", "stacked"] = "parallel"
    layers: int = Field(default=3, ge=1)
    cross: Literal["full", "low_rank", "mixture"] = "full"
    rank: int = Field(default=32, ge=1)
    experts: int = Field(default=4, ge=1)
    mlp: MlpConfig = MlpConfig(hidden=(400, 400, 400))

    def build(self, schema: Schema, device: torch.device) -> "DcnV2":
        """The model.

        Raises:
            ConfigError, SchemaError: features, labels or pooling do not fit the schema.
        """
        return DcnV2(self, schema, device)

    def cross_net(self, width: int) -> nn.Module:
        """The stack of cross layers for inputs of ``width``."""
        if self.cross == "mixture":
            return MixtureCrossNet(width, self.layers, self.rank, self.experts)
        return CrossNet(width, self.layers, self.rank if self.cross == "low_rank" else 0)


class DcnV2(LogitRanker):
    """x0 = [embeddings, floats]; logit = w^T [cross(x0), mlp(x0)] + b, or w^T mlp(cross(x0)) + b."""

    def __init__(self, config: DcnV2Config, schema: Schema, device: torch.device) -> None:
        super().__init__(schema, config.labels)
        inputs, dense_on = config.inputs(schema), dense_device(device)
        self.floats = DenseColumns(schema, inputs.dense, dense_on)
        width = len(inputs.keys) * config.dim + self.floats.width
        self.stacked = config.structure == "stacked"
        self.cross = config.cross_net(width).to(dense_on)
        self.mlp = Mlp(width, config.mlp, output=0).to(dense_on) if config.mlp.hidden else None
        last = width if self.mlp is None else self.mlp.width + (0 if self.stacked else width)
        self.head = Head(last, len(self.labels), device=dense_on)
        self.tables = PooledTables(schema, inputs.keys, config.dim, config.pooling, device)

    def logits(self, batch: Batch) -> Tensor:
        """[B, labels]."""
        first = self.tables(batch).flatten(1)
        if self.floats.width:
            first = torch.cat([first, self.floats(batch)], dim=1)
        logits: Tensor = self.head(self._trunk(first, batch.weight > 0))
        return logits

    def _trunk(self, first: Tensor, counted: Tensor) -> Tensor:
        crossed: Tensor = self.cross(first)
        if self.mlp is None:
            return crossed
        if self.stacked:
            deep: Tensor = self.mlp(crossed, counted)
            return deep
        return torch.cat([crossed, self.mlp(first, counted).to(crossed.dtype)], dim=1)
