"""Factorisation machine."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.fm import FactorizationMachine
from thresher.zoo.blocks.inputs import DenseColumns
from thresher.zoo.blocks.tables import PooledTables, dense_device
from thresher.zoo.ranking import LogitRanker, RankerConfig


class FmConfig(RankerConfig):
    """Factorisation machine, see README.md beside this file.

    Attributes:
        dim: factors per id; a table row holds them and one first-order weight per label.
    """

    name: Literal["fm"] = "fm"
    dim: int = Field(default=16, ge=1)

    def build(self, schema: Schema, device: torch.device) -> "Fm":
        """The model.

        Raises:
            ConfigError, SchemaError: features, labels or pooling do not fit the schema.
        """
        return Fm(self, schema, device)


class Fm(LogitRanker):
    """logit = b + sum_i w_i x_i + sum_{i<j} <v_i, v_j> x_i x_j over fields (Rendle 2010, equation 1)."""

    def __init__(self, config: FmConfig, schema: Schema, device: torch.device) -> None:
        super().__init__(schema, config.labels)
        inputs, dense_on = config.inputs(schema), dense_device(device)
        self.floats = DenseColumns(schema, inputs.dense, dense_on)
        self.machine = FactorizationMachine(config.dim, self.floats.width, len(self.labels)).to(dense_on)
        self.tables = PooledTables(schema, inputs.keys, config.dim + len(self.labels), config.pooling, device)

    def logits(self, batch: Batch) -> Tensor:
        """[B, labels]."""
        logits: Tensor = self.machine(self.tables(batch), self.floats(batch))[0]
        return logits
