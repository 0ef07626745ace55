"""DLRM: inner products of all pairs of embeddings and the floats' vector."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.dot import DotInteraction
from thresher.zoo.blocks.inputs import DenseColumns
from thresher.zoo.blocks.mlp import Mlp, MlpConfig
from thresher.zoo.blocks.tables import PooledTables, dense_device
from thresher.zoo.ranking import LogitRanker, RankerConfig


class DlrmConfig(RankerConfig):
    """DLRM, see README.md beside this file.

    Attributes:
        dim: width of embeddings and of the bottom perceptron's output; a multiple of 4.
        bottom: hidden layers over the floats; a layer of ``dim`` units with the same activation follows.
        top: hidden layers over the interactions.
        itself: whether a vector's product with itself is an interaction too.
    """

    name: Literal["dlrm"] = "dlrm"
    dim: int = Field(default=16, ge=4, multiple_of=4)
    bottom: MlpConfig = MlpConfig(hidden=(512, 256, 64))
    top: MlpConfig = MlpConfig(hidden=(512, 256))
    itself: bool = False

    def build(self, schema: Schema, device: torch.device) -> "Dlrm":
        """The model.

        Raises:
            ConfigError, SchemaError: features, labels or pooling do not fit the schema.
        """
        return Dlrm(self, schema, device)


class Dlrm(LogitRanker):
    """logit = top([z, <v_i, v_j> for i > j]), z = bottom(floats), v = (z, embeddings); without floats there is no z."""

    def __init__(self, config: DlrmConfig, schema: Schema, device: torch.device) -> None:
        super().__init__(schema, config.labels)
        inputs, dense_on = config.inputs(schema), dense_device(device)
        self.floats = DenseColumns(schema, inputs.dense, dense_on)
        bottom = config.bottom.model_copy(update={"hidden": (*config.bottom.hidden, config.dim)})
        self.bottom = Mlp(self.floats.width, bottom, output=0).to(dense_on) if self.floats.width else None
        vectors = len(inputs.keys) + (self.bottom is not None)
        self.dots = DotInteraction(vectors, config.itself, dense_on)
        top_inputs = self.dots.width + (self.bottom.width if self.bottom else 0)
        self.top = Mlp(top_inputs, config.top, output=len(self.labels)).to(dense_on)
        self.tables = PooledTables(schema, inputs.keys, config.dim, config.pooling, device)

    def logits(self, batch: Batch) -> Tensor:
        """[B, labels]."""
        embeddings, counted = self.tables(batch), batch.weight > 0
        if self.bottom is None:
            return self._top(self.dots(embeddings), counted)
        floats = self.bottom(self.floats(batch), counted).to(embeddings.dtype)
        pairs = self.dots(torch.cat([floats.unsqueeze(1), embeddings], dim=1))
        return self._top(torch.cat([floats, pairs.to(floats.dtype)], dim=1), counted)

    def _top(self, values: Tensor, counted: Tensor) -> Tensor:
        logits: Tensor = self.top(values, counted)
        return logits
