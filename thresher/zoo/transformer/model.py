"""The whole transformer on one device: what the pipeline's stages do together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thresher.data.batch import Batch
from thresher.pipeline.attention.whole import WholeContext
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.vocabulary.embedding import SplitEmbedding
from thresher.pipeline.vocabulary.head import Head, SliceTargets
from thresher.trainer.model import Retriever, SequenceModel
from thresher.zoo.blocks.losses import full_precision
from thresher.zoo.blocks.tables import dense_device
from thresher.zoo.transformer.sequences import TokenSequencer
from thresher.zoo.transformer.trunk import TransformerTrunk


class Transformer(SequenceModel):
    """Predicts each next token. Parameters have the names they have in a pipeline."""

    def __init__(self, trunk: TransformerTrunk, sequencer: TokenSequencer, device: torch.device) -> None:
        super().__init__()
        on = dense_device(device)
        self.sequencer, self.is_likelihood = sequencer, trunk.output.loss == "softmax"
        self.front, self.tail = trunk.front(), trunk.tail()
        self.layers = nn.ModuleDict({str(index): trunk.layer(index) for index in range(trunk.layers)})
        self.embedding = SplitEmbedding(
            nn.Parameter(trunk.table("embedding", 0, trunk.vocabulary, on)), trunk.vocabulary
        )
        own = self.embedding.weight if trunk.tied else nn.Parameter(trunk.table("head", 0, trunk.vocabulary, on))
        self._heads: Sequence[Head] = (trunk.head(own, 0),)  # not a submodule: a tied weight is the embedding's
        if not trunk.tied:
            self.head = self.output
        self.to(on)

    @property
    def output(self) -> Head:
        """The output layer."""
        head: Head = self._heads[0]
        return head

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, a scalar: the sum over samples of weight times the mean loss of a sample's tokens, over B."""
        sequences = self.sequencer.sequences(batch)
        return {"loss": self._loss(sequences, float(max(batch.size, 1)))}

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """What :meth:`forward` computed."""
        return outputs["loss"]

    def token_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`SequenceModel`."""
        sequences = self.sequencer.sequences(batch, per_token=True)
        return self._loss(sequences, 1.0), sequences.weights.sum()

    def encode(self, sequences: Microbatch) -> Tensor:
        """[B, S, D] outputs of the trunk."""
        seed = int(torch.randint(1 << 62, ())) if self.training else 0
        context = WholeContext(sequences, 0, seed=seed, step=0, training=self.training)
        values: Tensor = F.embedding(sequences.inputs, self.embedding.weight)
        for layer in (self.front, *self.layers.values(), self.tail):
            values = values if layer is None else layer(values, context)
        return values

    def _loss(self, sequences: Microbatch, total_weight: float) -> Tensor:
        hidden = self.encode(sequences)
        key = (int(torch.randint(1 << 62, ())) if self.training else 0, 0, 0, 0)
        targets = SliceTargets(sequences.targets, sequences.weights / total_weight, key)
        loss: Tensor = _HeadLoss.apply(hidden, self.output.weight, self.output, targets)  # type: ignore[no-untyped-call]
        return loss


class ItemTransformer(Transformer, Retriever):
    """Predicts the next item. score(query, item) = <h, w_item>, h the output at the newest item, w the output layer."""

    def __init__(self, trunk: TransformerTrunk, sequencer: TokenSequencer, device: torch.device) -> None:
        super().__init__(trunk, sequencer, device)
        self.item_rows, self.first_item = trunk.vocabulary, sequencer.columns.first_item

    def queries(self, batch: Batch) -> Tensor:
        """[B, dim]: the output at the newest item; zeros for an empty history."""
        states, last = full_precision(self.encode(self.sequencer.sequences(batch))), self.sequencer.last(batch)
        chosen = states[torch.arange(batch.size, device=states.device), last.clamp(min=0)]
        return torch.where((last >= 0).unsqueeze(1), chosen, 0.0)

    def items(self, rows: Tensor) -> Tensor:
        """[n, dim] rows of the output layer."""
        return F.embedding(rows, self.output.weight)

    def target(self, batch: Batch) -> Tensor:
        """[B] int64 row of the next item; 0 where it is missing."""
        return self.sequencer.target(batch)


class _HeadLoss(torch.autograd.Function):
    """A head that is not cut, under autograd: its loss with gradients of the hidden state and of its weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, head: Head, targets: SliceTargets) -> Tensor:
        partial, ctx.kept = head.part(hidden, targets)
        merged = head.merge([partial], targets)
        ctx.head, ctx.merged = head, merged
        return merged.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight = ctx.head.weight
        before, weight.grad = weight.grad, None
        ctx.head.weight_gradient(ctx.kept, ctx.merged.normaliser)
        own, weight.grad = weight.grad, before
        return ctx.merged.gradient * gradient, own * gradient, None, None
