"""A small trunk for tests of the runtime, and what one process without slices makes of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.pipeline.attention.whole import WholeContext
from thresher.pipeline.context import RelativeBias, SliceContext, TrunkBuilder, TrunkLayer
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.weights import SplitLinear
from thresher.pipeline.vocabulary.head import Head
from thresher.pipeline.vocabulary.softmax import SoftmaxHead

VOCABULARY, HEADS, WIDTH = 23, 4, 16
SEED = 5


class Positions(TrunkLayer):
    """Learned positions and dropout."""

    index = -1

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, WIDTH) * 0.1)
        self.drop = drop

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        return context.drop(values + self.table[context.positions], self.drop, self.index)


class Norm(TrunkLayer):
    index = -1

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        return self.norm(values)


class Layer(TrunkLayer):
    """Pre-norm attention and network; two query heads share a key."""

    def __init__(self, index: int, pointwise: bool, drop: float) -> None:
        super().__init__()
        self.index, self.drop = index, drop
        self.groups = HEADS if pointwise else HEADS // 2
        each = WIDTH // HEADS
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project = SplitLinear(WIDTH, WIDTH + 2 * self.groups * each)
        self.mix = SplitLinear(WIDTH, WIDTH)
        self.wide, self.narrow = SplitLinear(WIDTH, 3 * WIDTH), SplitLinear(3 * WIDTH, WIDTH)
        self.bias = nn.ParameterList([torch.randn(HEADS, 16), torch.randn(HEADS, 8)]) if pointwise else None

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        each = WIDTH // HEADS
        sizes = [WIDTH, self.groups * each, self.groups * each]
        split = self.project(self.norms[0](values)).split(sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, each)).transpose(1, 2) for part in split)
        if self.bias is None:
            out = context.attend(self.index, query, key, value)
        else:
            bias = RelativeBias(self.bias[0], self.bias[1])
            out = context.attend_pointwise(self.index, query, key, value, bias)
        values = values + context.drop(self.mix(out.transpose(1, 2).flatten(2)), self.drop, self.index, 0)
        hidden = F.gelu(self.wide(self.norms[1](values)))
        return values + context.drop(self.narrow(hidden), self.drop, self.index, 1)


@dataclass(frozen=True)
class Tiny(TrunkBuilder):
    """The builder; every part from its own seed."""

    layers: int = 8
    pointwise: bool = False
    tied: bool = False
    drop: float = 0.0
    dtype: torch.dtype = torch.float64
    width: int = WIDTH
    vocabulary: int = VOCABULARY

    def front(self) -> TrunkLayer:
        return self._seeded(1000, lambda: Positions(self.drop))

    def layer(self, index: int) -> TrunkLayer:
        return self._seeded(index, lambda: Layer(index, self.pointwise, self.drop))

    def tail(self) -> TrunkLayer:
        return self._seeded(2000, Norm)

    def table(self, name: str, first: int, last: int, device: torch.device) -> Tensor:
        seed = 1 if self.tied or name == "embedding" else 2
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.vocabulary, WIDTH, generator=generator, dtype=torch.float64)[first:last].to(self.dtype)

    def head(self, weight: nn.Parameter, first: int) -> Head:
        return SoftmaxHead(weight, first, self.vocabulary)

    def _seeded(self, seed: int, build):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build().to(self.dtype)


class Reference(nn.Module):
    """The whole model in one process: no slices, no pools, autograd for everything."""

    def __init__(self, builder: Tiny) -> None:
        super().__init__()
        self.front, self.tail = builder.front(), builder.tail()
        self.layers = nn.ModuleList(builder.layer(index) for index in range(builder.layers))
        device = torch.device("cpu")
        self.embedding = nn.Parameter(builder.table("embedding", 0, VOCABULARY, device))
        self.head = nn.Parameter(builder.table("head", 0, VOCABULARY, device))
        if builder.tied:
            self.head = self.embedding

    def loss(self, microbatches: list[Microbatch], step: int = 0) -> Tensor:
        total = sum(float(microbatch.weights.sum()) for microbatch in microbatches)
        return sum(self._loss(m, number, step) for number, m in enumerate(microbatches)) / total

    def _loss(self, microbatch: Microbatch, number: int, step: int) -> Tensor:
        context = WholeContext(microbatch, number, seed=SEED, step=step, training=self.training)
        values = microbatch.inputs if microbatch.are_vectors else F.embedding(microbatch.inputs, self.embedding)
        for layer in (self.front, *self.layers, self.tail):
            values = layer(values, context)
        logits = values @ self.head.t()
        losses = F.cross_entropy(logits.flatten(0, 1), microbatch.targets.flatten(), reduction="none")
        return (losses * microbatch.weights.flatten()).sum()

    def gradients(self) -> dict[str, Tensor]:
        """By the names that parts of ranks use."""
        renamed = {"embedding": "embedding.weight", "head": "head.weight"}
        return {renamed.get(name, name): p.grad for name, p in self.named_parameters() if p.grad is not None}


def padded(count: int, slices: int, tokens: int = 24, batch: int = 2, vectors: bool = False) -> list[Microbatch]:
    """Microbatches of rows of different lengths, padded."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        inputs, targets = torch.randint(VOCABULARY, (2, batch, tokens), generator=generator)
        lengths = torch.randint(tokens // 2, tokens + 1, (batch,), generator=generator)
        weights = (torch.arange(tokens) < lengths.unsqueeze(1)).double()
        times = torch.randint(0, 5000, (batch, tokens), generator=generator).cumsum(1)
        if vectors:
            inputs = torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)
        made.append(Microbatch(Layout(even_bounds(tokens, slices), batch), inputs, targets, weights, times))
    return made


def packed(count: int, slices: int, tokens: int = 40) -> list[Microbatch]:
    """Microbatches of one row with several sequences, some longer than a slice; slices are uneven."""
    generator = torch.Generator().manual_seed(8)
    made = []
    for number in range(count):
        inputs, targets = torch.randint(VOCABULARY, (2, 1, tokens), generator=generator)
        times = torch.randint(0, 5000, (1, tokens), generator=generator).cumsum(1)
        bounds = list(even_bounds(tokens, slices))
        bounds[1:-1] = [b + (i % 2) for i, b in enumerate(bounds[1:-1])]
        starts = ((0, 3, 4, 25, 38), (0, 17), (0, 30, 32, 34))[number % 3]
        weights = torch.rand(1, tokens, generator=generator, dtype=torch.float64)
        made.append(Microbatch(Layout(tuple(bounds), 1, starts), inputs, targets, weights, times))
    return made
