"""DeepFM: a factorisation machine and a perceptron over the same vectors."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.fm import FactorizationMachine
from thresher.zoo.blocks.inputs import DenseColumns
from thresher.zoo.blocks.mlp import Mlp, MlpConfig
from thresher.zoo.blocks.tables import PooledTables, dense_device
from thresher.zoo.ranking import LogitRanker, RankerConfig


class DeepFmConfig(RankerConfig):
    """DeepFM, see README.md beside this file.

    Attributes:
        dim: factors per id; a table row holds them and one first-order weight per label.
        mlp: the deep part.
    """

    name: Literal["deepfm"] = "deepfm"
    dim: int = Field(default=16, ge=1)
    mlp: MlpConfig = MlpConfig(hidden=(400, 400, 400))

    def build(self, schema: Schema, device: torch.device) -> "DeepFm":
        """The model.

        Raises:
            ConfigError, SchemaError: features, labels or pooling do not fit the schema.
        """
        return DeepFm(self, schema, device)


class DeepFm(LogitRanker):
    """logit = y_FM + y_DNN (Guo et al. 2017, equation 1)."""

    def __init__(self, config: DeepFmConfig, schema: Schema, device: torch.device) -> None:
        super().__init__(schema, config.labels)
        inputs, dense_on = config.inputs(schema), dense_device(device)
        labels = len(self.labels)
        self.floats = DenseColumns(schema, inputs.dense, dense_on)
        self.machine = FactorizationMachine(config.dim, self.floats.width, labels).to(dense_on)
        fields = len(inputs.keys) + self.floats.width
        self.mlp = Mlp(fields * config.dim, config.mlp, output=labels).to(dense_on)
        self.tables = PooledTables(schema, inputs.keys, config.dim + labels, config.pooling, device)

    def logits(self, batch: Batch) -> Tensor:
        """[B, labels]."""
        floats = self.floats(batch)
        shallow, vectors = self.machine(self.tables(batch), floats)
        hidden = self.machine.linear(self.mlp.first, vectors, floats)
        logits: Tensor = shallow + self.mlp.after_first(hidden, batch.weight > 0)
        return logits
