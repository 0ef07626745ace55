"""What the trainer asks of a model. A model is a function of tensors: it never names a rank, a device or a group."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.pipeline.context import TrunkBuilder
from thresher.pipeline.microbatch import Microbatch
from thresher.settings import Settings


class Model(nn.Module, ABC):
    """Reads a :class:`Batch`, returns outputs, and turns outputs into a loss.

    Tables are ``torchrec.EmbeddingBagCollection`` and ``torchrec.EmbeddingCollection`` submodules, which the trainer
    shards; everything else is dense and replicated.
    """

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs by name; logits or whatever :meth:`loss` and the evaluation need."""

    @abstractmethod
    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """A scalar: the sum over samples of weight times loss, divided by the number of samples B."""


class Ranker(Model):
    """Predicts labels of the schema, one output each under the label's name: [B], a logit (binary) or a value.

    Attributes:
        labels: the labels it predicts, in the order of its outputs.
    """

    labels: tuple[str, ...]


class Retriever(Model):
    """Embeds a query and scores every item of one table against it, for HR@k, NDCG@k and MRR over all items.

    Attributes:
        item_rows: number of rows of the item table; row ids are 0..item_rows - 1.
        first_item: smallest row that is an item (rows below are reserved).
    """

    item_rows: int
    first_item: int

    @abstractmethod
    def queries(self, batch: Batch) -> Tensor:
        """[B, D] vectors whose inner product with an item's vector is its score."""

    @abstractmethod
    def items(self, rows: Tensor) -> Tensor:
        """[n, D] vectors of the items ``rows`` [n] int64. Collective where tables are sharded: all ranks call it."""

    @abstractmethod
    def target(self, batch: Batch) -> Tensor:
        """[B] int64: the row of the item to be found."""


class Sequencer(ABC):
    """How a batch becomes the sequences that a trunk of layers reads.

    Attributes:
        length: tokens to which sequences are padded, S.
        first_item: smallest row that may be predicted.
        has_target: what follows the newest token is a column of its own: the item that is to be found.
    """

    length: int
    first_item: int
    has_target: bool

    @abstractmethod
    def sequences(self, batch: Batch, *, per_token: bool = False) -> Microbatch:
        """All samples as one microbatch of one slice.

        Args:
            per_token: weights of tokens are those of their samples, for measuring. Otherwise a sample's weight is
                shared out over its counted tokens, so that the weights of a batch mean what they mean to any model.
        """

    @abstractmethod
    def last(self, batch: Batch) -> Tensor:
        """[B] int64: the place of the newest token of each sample; -1 where there is none."""

    @abstractmethod
    def target(self, batch: Batch) -> Tensor:
        """[B] int64: the row that follows the newest token, where there is such a column; 0 where it is missing."""


class SequenceModel(Model):
    """Predicts each next token of sequences. Also a :class:`Retriever` where tokens are items.

    Attributes:
        is_likelihood: the loss of a token is its negative log likelihood in nats.
    """

    is_likelihood: bool

    @abstractmethod
    def token_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scalars: the sum over counted tokens of their sample's weight times their loss, and of the weights."""


class ModelConfig(Settings, ABC):
    """Settings of one model; ``name`` is a ``Literal`` that chooses the model in a YAML file."""

    name: str

    @abstractmethod
    def build(self, schema: Schema, device: torch.device) -> Model:
        """The model for data of ``schema``; when ``device`` is meta, tables are there and the dense part on the CPU."""


class SequenceConfig(ModelConfig, ABC):
    """Settings of a model that can be cut into the stages of a pipeline."""

    @property
    @abstractmethod
    def is_likelihood(self) -> bool:
        """The loss of a token is its negative log likelihood in nats."""

    @abstractmethod
    def attention_share(self, tokens: int) -> float:
        """Work of attention over sequences of ``tokens`` tokens, over that of everything else in a layer."""

    @abstractmethod
    def trunk(self, schema: Schema, seed: int) -> TrunkBuilder:
        """The parts of the model, each from its own seed."""

    @abstractmethod
    def sequencer(self, schema: Schema) -> Sequencer:
        """What its batches are turned into."""
