"""The model that all contestants train: a byte-level decoder, its layers the same modules everywhere."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.pipeline.attention.whole import WholeContext
from thresher.pipeline.context import SliceContext, TrunkBuilder, TrunkLayer
from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.vocabulary.head import Head
from thresher.pipeline.vocabulary.softmax import SoftmaxHead


@dataclass(frozen=True)
class Size:
    """Of the model and of one sequence.

    Attributes:
        layers: L.
        width: D.
        heads: of attention.
        tokens: per sequence, S; a microbatch is one sequence.
        vocabulary: rows of the embedding and of the output layer.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    tokens: int = 8192
    vocabulary: int = 256


class DecoderLayer(TrunkLayer):
    """x + attention(norm(x)), then x + network(norm(x)); queries, keys and values have matrices of their own."""

    def __init__(self, size: Size, index: int) -> None:
        super().__init__()
        self.index, self.heads = index, size.heads
        torch.manual_seed(1000 + index)
        self.attention_norm, self.network_norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.query, self.key, self.value, self.out = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))
        self.into = nn.Linear(size.width, 4 * size.width, bias=False)
        self.back = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        normed = self.attention_norm(values)
        query, key, value = (self._apart(matrix(normed)) for matrix in (self.query, self.key, self.value))
        mixed = context.attend(self.index, query, key, value)
        values = values + self.out(mixed.transpose(1, 2).flatten(2))
        inner: Tensor = self.back(F.gelu(self.into(self.network_norm(values))))
        return values + inner

    def _apart(self, values: Tensor) -> Tensor:
        """[B, H, T, E] from [B, T, D]."""
        return values.unflatten(2, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return, no-untyped-call]


class Decoder(TrunkBuilder):
    """Makes the parts of the model; every part from a seed of its own, so all contestants start with the same."""

    tied = False

    def __init__(self, size: Size) -> None:
        self.size = size
        self.layers, self.width, self.vocabulary = size.layers, size.width, size.vocabulary

    def front(self) -> None:
        """Nothing."""

    def layer(self, index: int) -> TrunkLayer:
        """Layer ``index``."""
        return DecoderLayer(self.size, index)

    def tail(self) -> None:
        """Nothing."""

    def table(self, name: str, first: int, last: int, device: torch.device) -> Tensor:
        """Rows of the embedding (of unit variance) or of the output layer."""
        generator = torch.Generator().manual_seed(len(name))
        scale = 1.0 if name == "embedding" else self.width**-0.5
        return torch.randn(self.vocabulary, self.width, generator=generator)[first:last].to(device) * scale

    def head(self, weight: nn.Parameter, first: int) -> Head:
        """Cross entropy over the vocabulary."""
        return SoftmaxHead(weight, first, self.vocabulary)


class Part(nn.Module):
    """Consecutive layers with torch's own attention; the first part has the embedding, the last one the logits.

    Parameters have the names they have in our runtime, so that gradients can be compared.
    """

    def __init__(self, size: Size, layers: range) -> None:
        super().__init__()
        made, device = Decoder(size), torch.device("cpu")
        self.embedding = nn.Embedding(size.vocabulary, size.width) if layers.start == 0 else None
        if self.embedding is not None:
            self.embedding.weight = nn.Parameter(made.table("embedding", 0, size.vocabulary, device))
        self.layers = nn.ModuleDict({str(index): made.layer(index) for index in layers})
        self.head = nn.Linear(size.width, size.vocabulary, bias=False) if layers.stop == size.layers else None
        if self.head is not None:
            self.head.weight = nn.Parameter(made.table("head", 0, size.vocabulary, device))
        self.context = WholeContext(batch(size, 1, 0)[0], 0, seed=0, step=0, training=True)

    def forward(self, values: Tensor) -> Tensor:
        """Ids [B, S] or hidden states [B, S, D] to hidden states, or logits [B, S, V]."""
        if self.embedding is not None:
            values = self.embedding(values)
        values = self.trunk(values)
        return values if self.head is None else self.head(values)

    def trunk(self, values: Tensor) -> Tensor:
        """The layers alone."""
        for layer in self.layers.values():
            values = layer(values, self.context)
        return values


def batch(size: Size, microbatches: int, step: int) -> list[Microbatch]:
    """Sequences in which each byte follows from the one before it in three of four cases."""
    generator = torch.Generator().manual_seed(step)
    follows = torch.randperm(size.vocabulary, generator=torch.Generator().manual_seed(0))
    shape = (microbatches, size.tokens + 1)
    ids = torch.randint(size.vocabulary, shape, generator=generator)
    regular = torch.rand(shape, generator=generator) < 0.75
    for place in range(1, size.tokens + 1):
        ids[:, place] = torch.where(regular[:, place], follows[ids[:, place - 1]], ids[:, place])
    layout = Layout((0, size.tokens))
    weights = torch.ones(1, size.tokens)
    return [Microbatch(layout, row[None, :-1], row[None, 1:].contiguous(), weights) for row in ids]


def cut(microbatches: list[Microbatch], bounds: tuple[int, ...]) -> list[Microbatch]:
    """The same microbatches, cut into slices at ``bounds``."""
    return [replace(microbatch, layout=Layout(bounds)) for microbatch in microbatches]


def loss_of(logits: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Cross entropy, summed and divided by the ``tokens`` of the step."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens
