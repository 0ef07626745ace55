"""What all rankers share: the choice of inputs and labels, logits by label, and the loss."""

from abc import ABC, abstractmethod

from torch import Tensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.trainer.model import ModelConfig, Ranker
from thresher.zoo.blocks.inputs import Inputs, choose_inputs, choose_labels
from thresher.zoo.blocks.losses import full_precision, sample_loss, weighted_mean
from thresher.zoo.blocks.tables import Pooling


class RankerConfig(ModelConfig, ABC):
    """Settings of every ranker.

    Attributes:
        labels: labels to predict; empty for the schema's first.
        features: sparse, dense and sequence features to read, and id side columns (``history.category``); empty for
            all of them. Float side columns are not read by rankers.
        pooling: how the rows of several ids become one vector.
    """

    labels: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    pooling: Pooling = "mean"

    def inputs(self, schema: Schema) -> Inputs:
        """The inputs this model reads.

        Raises:
            ConfigError: ``features`` does not fit the schema.
        """
        return choose_inputs(schema, self.features)

    def outputs(self, schema: Schema) -> int:
        """The number of labels this model predicts.

        Raises:
            SchemaError: the schema has no label.
            ConfigError: ``labels`` does not fit the schema.
        """
        return len(choose_labels(schema, self.labels))


class LogitRanker(Ranker, ABC):
    """A ranker that computes all its labels' logits (or values) as one matrix."""

    def __init__(self, schema: Schema, labels: tuple[str, ...]) -> None:
        super().__init__()
        chosen = choose_labels(schema, labels)
        self.labels = tuple(label.name for label in chosen)
        self.tasks = tuple(label.task for label in chosen)
        self.label_columns = tuple(schema.labels.index(label) for label in chosen)

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """[B, number of labels]."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Logits (values, for regression) by label, [B] each, float32 under autocast."""
        logits = full_precision(self.logits(batch))
        return {label: logits[:, i] for i, label in enumerate(self.labels)}

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The sum over labels of the weighted mean log loss or squared error."""
        losses = [
            weighted_mean(
                sample_loss(outputs[label], batch.labels[:, column].to(outputs[label].dtype), task), batch.weight
            )
            for label, column, task in zip(self.labels, self.label_columns, self.tasks, strict=True)
        ]
        return sum(losses[1:], losses[0])
