"""Settings of the transformer."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from thresher.data.schema import Schema
from thresher.errors import ConfigError
from thresher.trainer.model import SequenceConfig
from thresher.zoo.transformer.model import ItemTransformer, Transformer
from thresher.zoo.transformer.sequences import TokenSequencer, choose_tokens
from thresher.zoo.transformer.shape import TrunkShape
from thresher.zoo.transformer.trunk import Output, TransformerTrunk


class TransformerConfig(SequenceConfig):
    """A decoder over tokens or items, see README.md beside this file.

    Attributes:
        sequence: the tokens, or the history of items; empty where the schema has one sequence.
        target: the next item, a sparse feature of one id on the sequence's table; empty for the only one, or where
            there is none: then a sequence is all there is, and its last token is predicted only.
        times: a float side column of the sequence, in seconds, for biases by time of pointwise attention; empty for no
            such bias.
        dim: width of hidden states; a multiple of ``heads``.
        kv_heads: heads of keys and values, which ``heads`` is a multiple of (grouped queries); 0 for as many.
        ffn: width inside the network of a layer; 0 for 4 x ``dim`` (8/3 x ``dim`` for ``swiglu``).
        attention: ``softmax``, or ``pointwise``: HSTU's layer, which has no network of its own.
        positions: ``rotary``, ``learned``, or ``none`` (pointwise attention has a bias by distance).
        distances: distances that pointwise attention tells apart; farther tokens share the last one.
        norm: of the inputs of layers and networks, and at the end.
        dropout: on embeddings, and on what a layer adds.
        tied: the output layer is the embedding.
        loss: over all tokens (``softmax``), over the next one and sampled ones (``sampled_softmax``, corrected for how
            often each is drawn), or log losses of the next one and of sampled ones (``bce``).
        negatives: drawn for all tokens of a slice together (``sampled_softmax``), or for each token (``bce``).
        sampling: ``uniform``, or ``log_uniform``: by rank in falling frequency, which is what rows of a vocabulary are.
        max_length: newest tokens that are inputs, to which all sequences are padded; 0 for all that the data hold.
        places: train on ``all`` places, or on the ``last`` one of data that hold one sample per place.
    """

    name: Literal["transformer"] = "transformer"
    sequence: str = ""
    target: str = ""
    times: str = ""
    dim: int = Field(default=128, ge=2)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=0, ge=0)
    ffn: int = Field(default=0, ge=0, multiple_of=2)
    attention: Literal["softmax", "pointwise"] = "softmax"
    positions: Literal["rotary", "learned", "none"] = "rotary"
    distances: int = Field(default=128, ge=1)
    norm: Literal["layer", "rms"] = "rms"
    activation: Literal["gelu", "swiglu"] = "gelu"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    tied: bool = False
    loss: Literal["softmax", "sampled_softmax", "bce"] = "softmax"
    negatives: int = Field(default=128, ge=1)
    sampling: Literal["uniform", "log_uniform"] = "uniform"
    max_length: int = Field(default=0, ge=0)
    places: Literal["all", "last"] = "all"

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerConfig":
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}; set dim to a multiple")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; set heads to a multiple"
            )
        if self.positions == "rotary" and (self.dim // self.heads) % 2:
            raise ValueError(
                f"rotary positions turn pairs, but a head is {self.dim // self.heads} wide; "
                "set positions: learned, or another dim or heads"
            )
        if self.dim % 2:
            raise ValueError(f"dim {self.dim} is odd; set dim to an even number")
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> "TransformerConfig":
        if self.attention == "pointwise" and self.kv_heads not in (0, self.heads):
            raise ValueError(f"pointwise attention has no grouped queries; set kv_heads to 0 or to heads {self.heads}")
        if self.times and self.attention != "pointwise":
            raise ValueError(f"times '{self.times}' are for pointwise attention; set attention: pointwise, or no times")
        return self

    @property
    def is_likelihood(self) -> bool:
        """See :class:`SequenceConfig`."""
        return self.loss == "softmax"

    def attention_share(self, tokens: int) -> float:
        """See :class:`SequenceConfig`; in multiplications: half of all pairs of tokens, twice."""
        shape = self.shape
        network = 0 if shape.pointwise else shape.ffn * (3 if shape.activation == "swiglu" else 2)
        projections = 5 * shape.dim if shape.pointwise else 2 * (shape.dim + shape.kv_dim)
        return tokens / (projections + network)

    @property
    def shape(self) -> TrunkShape:
        """What layers are told."""
        return TrunkShape(
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            ffn=self.ffn or self._default_ffn,
            pointwise=self.attention == "pointwise",
            positions=self.positions,
            distances=self.distances,
            timed=bool(self.times),
            norm=self.norm,
            activation=self.activation,
            dropout=self.dropout,
        )

    @property
    def _default_ffn(self) -> int:
        return 4 * self.dim if self.activation == "gelu" else -(-8 * self.dim // 48) * 16

    def sequencer(self, schema: Schema) -> TokenSequencer:
        """How batches become sequences.

        Raises:
            ConfigError: ``sequence``, ``target`` or ``times`` does not fit the schema.
            SchemaError: there is no sequence, or too few tokens or items.
        """
        columns = choose_tokens(schema, self.sequence, self.target, self.times)
        return TokenSequencer(columns, self.max_length, self.places == "last")

    def trunk(self, schema: Schema, seed: int) -> TransformerTrunk:
        """The parts, each from its own seed.

        Raises:
            ConfigError, SchemaError: as :meth:`sequencer`.
        """
        sequencer = self.sequencer(schema)
        columns = sequencer.columns
        if self.sampling == "log_uniform" and schema.table(columns.table).ids != "vocabulary":
            raise ConfigError(
                f"log_uniform takes rows to be in falling frequency, which those of table '{columns.table}' are not",
                where="model.sampling",
                fix="set sampling: uniform, or prepare the data with ids=vocabulary",
            )
        output = Output(self.loss, range(columns.first_item, columns.rows), self.sampling, self.negatives)
        return TransformerTrunk(self.shape, columns.rows, sequencer.length, output, tied=self.tied, seed=seed)

    def build(self, schema: Schema, device: torch.device) -> Transformer:
        """The whole model; its initial weights depend on torch's seed.

        Raises:
            ConfigError, SchemaError: as :meth:`sequencer`.
        """
        sequencer, trunk = self.sequencer(schema), self.trunk(schema, torch.initial_seed())
        kind = ItemTransformer if sequencer.columns.target else Transformer
        return kind(trunk, sequencer, device)
