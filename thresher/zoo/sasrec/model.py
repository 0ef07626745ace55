"""SASRec: the next item from a causal transformer over the history."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import KeyedJaggedTensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.trainer.model import ModelConfig, Retriever
from thresher.zoo.blocks.history import (
    Columns,
    History,
    choose_columns,
    first_item,
    no_history,
    read_history,
    targets,
)
from thresher.zoo.blocks.losses import full_precision
from thresher.zoo.blocks.negatives import sample_negatives
from thresher.zoo.blocks.tables import build_sequence_tables, dense_device
from thresher.zoo.blocks.transformer import AgePositions, Block


class SasRecConfig(ModelConfig):
    """SASRec, see README.md beside this file.

    Attributes:
        sequence: the history; empty where the schema has one sequence.
        target: the next item, a sparse feature of one id on the sequence's table; empty where there is just one.
        dim: width of embeddings and of the transformer; a multiple of 4 and of ``heads``.
        max_length: newest items of a history that are used; 0 for the sequence's own ``max_length``.
        dropout: on embeddings, attention and networks.
        loss: ``bce`` (the paper: log loss of the positive and of each negative) or ``sampled_softmax``.
        negatives: negatives per place.
        places: train on ``all`` places of a history (the paper), or on the ``last`` one, when data already hold one
            sample per place.
        seed: of the negatives.
    """

    name: Literal["sasrec"] = "sasrec"
    sequence: str = ""
    target: str = ""
    dim: int = Field(default=64, ge=4, multiple_of=4)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=1, ge=1)
    max_length: int = Field(default=0, ge=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    loss: Literal["bce", "sampled_softmax"] = "bce"
    negatives: int = Field(default=1, ge=1)
    places: Literal["all", "last"] = "all"
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _heads_divide(self) -> "SasRecConfig":
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self

    def build(self, schema: Schema, device: torch.device) -> "SasRec":
        """The model.

        Raises:
            ConfigError: ``sequence`` or ``target`` does not fit the schema.
            SchemaError: no sequence, no target on its table, or a table of fewer than two items.
        """
        return SasRec(self, schema, device)


class SasRec(Retriever):
    """score(query, item) = <h, e_item>, h the transformer's output at the newest item; an empty history has h = 0."""

    def __init__(self, config: SasRecConfig, schema: Schema, device: torch.device) -> None:
        super().__init__()
        self.config, dense_on = config, dense_device(device)
        self.columns: Columns = choose_columns(schema, config.sequence, config.target)
        table = schema.table(self.columns.table)
        self.item_rows, self.first_item = table.rows, first_item(table)
        self.length = min(config.max_length or self.columns.max_length, self.columns.max_length)
        self.positions = AgePositions(self.length, config.dim).to(dense_on)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.dropout) for _ in range(config.layers))
        self.blocks.to(dense_on)
        self.norm = nn.LayerNorm(config.dim, device=dense_on)
        self.drop = nn.Dropout(config.dropout)
        uses = {table.name: list(self.columns.keys)}
        self.collection = build_sequence_tables(schema, uses, config.dim, device)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scores at the N trained places of the batch.

        Returns:
            ``positive`` [N] and ``negative`` [N, negatives] scores, ``share`` [N]: each place's share of its sample's
            loss (0 where the positive is no item), and ``owner`` [N], the sample of each place.
        """
        history = read_history(batch.sparse[self.columns.sequence], self.length)
        target_rows, present = targets(batch.sparse[self.columns.target])
        following = history.shifted(history.ids, target_rows)
        valid = history.shifted(torch.ones_like(following, dtype=torch.bool), present) & (following >= self.first_item)
        counter = (batch.index[history.owner], batch.epoch[history.owner], history.place)
        draws = sample_negatives(
            following, counter, self.config.seed, self.config.negatives, range(self.first_item, self.item_rows)
        )
        rows, target, negative = self._lookup(history, target_rows, self._trained(history, draws).flatten())
        states = full_precision(self._trained(history, self.encode(rows, history)))
        positive = self._trained(history, history.shifted(rows, target))
        negative = negative.view(len(states), self.config.negatives, self.config.dim)
        shares = valid.to(states.dtype) if self.config.places == "last" else history.shares(valid).to(states.dtype)
        return {
            "positive": (states * positive).sum(1),
            "negative": (states.unsqueeze(1) * negative).sum(2),
            "share": self._trained(history, shares),
            "owner": self._trained(history, history.owner),
        }

    def _trained(self, history: History, values: Tensor) -> Tensor:
        """Those of ``values`` [N, ...] whose places are trained."""
        return values if self.config.places == "all" else values.index_select(0, history.ends)

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """sum(weight * loss) / B; a sample's loss is the mean over its trained places, 0 for an empty history."""
        positive, negative = full_precision(outputs["positive"]), full_precision(outputs["negative"])
        if self.config.loss == "bce":
            losses = F.softplus(-positive) + F.softplus(negative).sum(1)
        else:
            losses = torch.cat([positive.unsqueeze(1), negative], dim=1).logsumexp(1) - positive
        weights = batch.weight[outputs["owner"]] * outputs["share"]
        return (losses * weights).sum() / max(batch.size, 1)

    def queries(self, batch: Batch) -> Tensor:
        """[B, dim]: the state at the newest item; zeros for an empty history."""
        history = read_history(batch.sparse[self.columns.sequence], self.length)
        none = history.ids.new_zeros(0)
        rows, _, _ = self._lookup(history, none, none)
        states = full_precision(self.encode(rows, history)).index_select(0, history.ends)
        return states.new_zeros(batch.size, self.config.dim).index_copy(0, history.owner[history.ends], states)

    def items(self, rows: Tensor) -> Tensor:
        """[n, dim] embeddings of item rows [n] int64."""
        _, _, vectors = self._lookup(no_history(rows.device), rows.new_zeros(0), rows)
        return vectors

    def target(self, batch: Batch) -> Tensor:
        """[B] int64 row of the next item; 0 where it is missing."""
        return targets(batch.sparse[self.columns.target])[0]

    def encode(self, rows: Tensor, history: History) -> Tensor:
        """[N, dim] states of the places of all histories, from their items' embeddings [N, dim]."""
        values = rows * self.config.dim**0.5 + self.positions(history.lengths, history.owner, history.place)
        values, grid = self.drop(values), history.grid
        for block in self.blocks:
            values = block(values, grid)
        states: Tensor = self.norm(values)
        return states

    def _lookup(self, history: History, target: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of the history [N, dim], the targets and the negatives, in one pass through the collection.

        The collection always sees the same keys: its sharded version settles their order at the first call.
        """
        samples = history.lengths.numel()
        spread = torch.zeros(samples, dtype=torch.int64, device=target.device)
        of_target = torch.full_like(spread, 1 if target.numel() else 0)
        of_negatives = spread.index_fill(0, spread.new_zeros(1), negatives.numel())
        ids = KeyedJaggedTensor(
            keys=list(self.columns.keys),
            values=torch.cat([history.ids, target, negatives]),
            lengths=torch.cat([history.lengths, of_target, of_negatives]),
        )
        rows = self.collection(ids)
        history_key, target_key, negative_key = self.columns.keys
        return rows[history_key].values(), rows[target_key].values(), rows[negative_key].values()
