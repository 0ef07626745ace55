"""Logistic regression: one weight per id and float."""

from typing import Literal

import torch
from torch import Tensor, nn

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.inputs import DenseColumns
from thresher.zoo.blocks.tables import PooledTables, dense_device
from thresher.zoo.ranking import LogitRanker, RankerConfig


class LrConfig(RankerConfig):
    """Logistic regression, see README.md beside this file. ``pooling: sum`` is the textbook sum over a multi-hot x."""

    name: Literal["lr"] = "lr"

    def build(self, schema: Schema, device: torch.device) -> "Lr":
        """The model.

        Raises:
            ConfigError, SchemaError: features, labels or pooling do not fit the schema.
        """
        return Lr(self, schema, device)


class Lr(LogitRanker):
    """logit_l = b_l + sum over ids w_{id,l} + sum over floats w_{i,l} x_i."""

    def __init__(self, config: LrConfig, schema: Schema, device: torch.device) -> None:
        super().__init__(schema, config.labels)
        inputs, dense_on = config.inputs(schema), dense_device(device)
        self.floats = DenseColumns(schema, inputs.dense, dense_on)
        self.bias = nn.Parameter(torch.zeros(len(self.labels), device=dense_on))
        self.float_weights = nn.Parameter(torch.zeros(self.floats.width, len(self.labels), device=dense_on))
        self.tables = PooledTables(schema, inputs.keys, len(self.labels), config.pooling, device)

    def logits(self, batch: Batch) -> Tensor:
        """[B, labels]. Columns of a row beyond the labels are padding and get no gradient."""
        weights: Tensor = self.tables(batch).sum(dim=1)[:, : len(self.labels)]
        logits: Tensor = self.bias + weights + self.floats(batch) @ self.float_weights
        return logits
