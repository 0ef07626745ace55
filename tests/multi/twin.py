"""One small model twice: with TorchRec's collections, to be sharded, and as plain torch on whole tables.

The plain twin shares no code with the package but the initial weights: lookups are ``F.embedding_bag`` and
``F.embedding``, the optimizers are written out.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from thresher.embeddings.init import init_tables
from thresher.embeddings.optimizers import TableOptimizer

KEYS = ["seq_b", "unused", "bag_a", "bag_w", "seq_a", "bag_n", "bag_b", "bag_c", "bag_m", "seq_c"]
ROWS = {"shared": 11, "alone": 300, "mean": 10, "norm": 21, "weighted": 13, "item": 17, "side": 8}
TABLE_OF = {
    "bag_a": "shared",
    "bag_b": "shared",
    "bag_c": "alone",
    "bag_m": "mean",
    "bag_n": "norm",
    "bag_w": "weighted",
    "seq_a": "item",
    "seq_b": "item",
    "seq_c": "side",
}
BATCH = 24
DIM, SEQUENCE_DIM = 16, 8
DENSE_LR = 0.05


@dataclass(frozen=True)
class Sample:
    """A global batch: ids and weights by feature, one list a sample, and labels [BATCH]."""

    ids: dict[str, list[list[int]]]
    weights: dict[str, list[list[float]]]
    labels: Tensor

    def part(self, rank: int, world: int) -> tuple[KeyedJaggedTensor, Tensor]:
        """The rank's share. Every key has weights; only ``bag_w`` is looked up in a collection that heeds them."""
        size = BATCH // world
        rows = slice(rank * size, (rank + 1) * size)
        lengths = [len(bag) for key in KEYS for bag in self.ids[key][rows]]
        values = [i for key in KEYS for bag in self.ids[key][rows] for i in bag]
        weights = [w for key in KEYS for bag in self.weights[key][rows] for w in bag]
        kjt = KeyedJaggedTensor(
            KEYS,
            torch.tensor(values, dtype=torch.int64),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor(lengths, dtype=torch.int64),
        )
        return kjt, self.labels[rows]


def samples(steps: int, seed: int = 0) -> list[Sample]:
    """Global batches with duplicates and empty bags; step 3 is empty in its first half, step 5 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return [_sample(step, generator) for step in range(steps)]


def _sample(step: int, generator: torch.Generator) -> Sample:
    ids: dict[str, list[list[int]]] = {}
    weights: dict[str, list[list[float]]] = {}
    for key in KEYS:
        counts = torch.randint(0, 5, (BATCH,), generator=generator)
        counts[torch.rand(BATCH, generator=generator) < 0.3] = 0
        counts[: {3: BATCH // 2, 5: BATCH}.get(step, 0)] = 0
        rows = ROWS[TABLE_OF.get(key, "alone")]
        draw = [torch.rand(int(n), generator=generator) for n in counts]
        ids[key] = [(u**2 * rows).long().tolist() for u in draw]
        weights[key] = [(u + 0.5).tolist() for u in draw]
    return Sample(ids, weights, torch.randint(0, 2, (BATCH,), generator=generator).float())


class Net(nn.Module):
    """Three pooled collections and a sequence collection, at different depths, all fed by one KeyedJaggedTensor.

    Sum and mean pooling stand side by side in ``bags``; ``bag_a`` and ``bag_b`` share a table, so do two sequences.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        target = torch.device(device)
        bag = [_bag("shared", ["bag_a", "bag_b"]), _bag("norm", ["bag_n"], PoolingType.MEAN), _bag("alone", ["bag_c"])]
        self.bags = EmbeddingBagCollection(bag, device=target)
        self.inner = nn.ModuleDict(
            {"mean": EmbeddingBagCollection([_bag("mean", ["bag_m"], PoolingType.MEAN)], device=target)}
        )
        self.weighted = EmbeddingBagCollection([_bag("weighted", ["bag_w"])], is_weighted=True, device=target)
        sequence = [
            EmbeddingConfig(name="item", num_embeddings=17, embedding_dim=8, feature_names=["seq_a", "seq_b"]),
            EmbeddingConfig(name="side", num_embeddings=8, embedding_dim=8, feature_names=["seq_c"]),
        ]
        self.sequences = EmbeddingCollection(sequence, device=target)
        self.top = Top()

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        """[B] logits."""
        mean = self.inner["mean"](kjt)["bag_m"]
        bags, weighted, sequences = self.bags(kjt), self.weighted(kjt)["bag_w"], self.sequences(kjt)
        pooled = [bags["bag_a"], bags["bag_b"], bags["bag_c"], bags["bag_n"], mean, weighted]
        return self.top(pooled, [(sequences[k].values(), sequences[k].lengths()) for k in ("seq_a", "seq_b", "seq_c")])


class Top(nn.Module):
    """The dense part of both twins: logits from pooled vectors and from per-id vectors with their lengths."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.pooled = nn.Parameter(torch.randn(6 * DIM, generator=generator))
        self.each = nn.Parameter(torch.randn(SEQUENCE_DIM, 3, generator=generator))

    def forward(self, pooled: list[Tensor], sequences: list[tuple[Tensor, Tensor]]) -> Tensor:
        logits = torch.cat(pooled, 1) @ self.pooled
        for number, (values, lengths) in enumerate(sequences):
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            scores = torch.tanh(values @ self.each[:, number])
            logits = logits + torch.zeros(len(lengths)).index_add(0, owner, scores)
        return logits


def _bag(name: str, features: list[str], pooling: PoolingType = PoolingType.SUM) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=ROWS[name], embedding_dim=DIM, feature_names=features, pooling=pooling
    )


PATHS = {
    "shared": "bags.shared",
    "alone": "bags.alone",
    "norm": "bags.norm",
    "mean": "inner.mean.mean",
    "weighted": "weighted.weighted",
    "item": "sequences.item",
    "side": "sequences.side",
}


@dataclass
class Plain:
    """The plain twin and its training.

    Attributes:
        parts: column shards over each of which row-wise Adagrad keeps a state of its own; 1 for uncut rows.
        tables: whole weights by path.
        losses: of each step.
    """

    optimizer: TableOptimizer
    seed: int
    parts: int = 1
    tables: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def train(self, steps: list[Sample]) -> "Plain":
        net = Net("cpu")
        init_tables(net, self.seed, self.optimizer.init_scale)
        weights = dict(net.named_parameters())
        folder = {name: "embeddings" if name in ("item", "side") else "embedding_bags" for name in ROWS}
        parents = {name: path.rpartition(".")[0] for name, path in PATHS.items()}
        self.tables = {p: weights[f"{parents[n]}.{folder[n]}.{n}.weight"].detach() for n, p in PATHS.items()}
        self._state = {p: (torch.zeros_like(w), torch.zeros_like(w)) for p, w in self.tables.items()}
        self._updates = dict.fromkeys(self.tables, 0)
        self.top = Top()
        for sample in steps:
            self._step(sample)
        return self

    def _step(self, sample: Sample) -> None:
        for weight in self.tables.values():
            weight.requires_grad_(True).grad = None
        self.top.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self._logits(sample), sample.labels)
        loss.backward()
        self.losses.append(float(loss.detach()))
        with torch.no_grad():
            for path, weight in self.tables.items():
                self._update(path, weight)
            for parameter in self.top.parameters():
                parameter -= DENSE_LR * parameter.grad

    def _logits(self, sample: Sample) -> Tensor:
        pooled = [self._bag(sample, key, "sum") for key in ("bag_a", "bag_b", "bag_c")]
        pooled += [
            self._bag(sample, "bag_n", "mean"),
            self._bag(sample, "bag_m", "mean"),
            self._bag(sample, "bag_w", "sum", weighted=True),
        ]
        sequences = []
        for key in ("seq_a", "seq_b", "seq_c"):
            ids, lengths = _flat(sample.ids[key])
            sequences.append((F.embedding(ids, self.tables[PATHS[TABLE_OF[key]]]), lengths))
        return self.top(pooled, sequences)

    def _bag(self, sample: Sample, key: str, mode: str, weighted: bool = False) -> Tensor:
        ids, lengths = _flat(sample.ids[key])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        weights = torch.tensor([w for bag in sample.weights[key] for w in bag]) if weighted else None
        table = self.tables[PATHS[TABLE_OF[key]]]
        return F.embedding_bag(ids, table, offsets, mode=mode, per_sample_weights=weights, include_last_offset=True)

    def _update(self, path: str, weight: Tensor) -> None:
        if weight.grad is None:
            return
        touched = weight.grad.ne(0).any(1)
        self._updates[path] += 1
        x, g, state = weight[touched], weight.grad[touched], self._state[path]
        first, second = (memory[touched] for memory in state)
        step = getattr(self, f"_{self.optimizer.name}")
        weight[touched], first, second = step(x, g, first, second, self._updates[path])
        for memory, moved in zip(state, (first, second), strict=True):
            memory[touched] = moved

    def _sgd(self, x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        return x - self.optimizer.lr * g, first, second

    def _adagrad(self, x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        first = first + g**2
        return x - self.optimizer.lr * g / (first.sqrt() + self.optimizer.eps), first, second

    def _rowwise_adagrad(
        self, x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = first + self._row_mean(g**2)
        return x - self.optimizer.lr * g / (first.sqrt() + self.optimizer.eps), first, second

    def _adam(self, x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._moments(x, g, g**2, first, second, t)

    def _rowwise_adam(
        self, x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._moments(x, g, self._row_mean(g**2), first, second, t)

    def _moments(
        self, x: Tensor, g: Tensor, square: Tensor, first: Tensor, second: Tensor, t: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        one, two = self.optimizer.betas
        first, second = one * first + (1 - one) * g, two * second + (1 - two) * square
        scaled = (second / (1 - two**t)).sqrt() + self.optimizer.eps
        return x - self.optimizer.lr * (first / (1 - one**t)) / scaled, first, second

    def _ftrl(self, x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.optimizer
        grown = second + g**2
        first = first + g - (grown.sqrt() - second.sqrt()) / settings.lr * x
        x = -first / ((settings.ftrl_beta + grown.sqrt()) / settings.lr + settings.l2)
        return x, first, grown

    def _row_mean(self, square: Tensor) -> Tensor:
        mean = square.unflatten(1, (self.parts, -1)).mean(2)
        return mean.repeat_interleave(square.shape[1] // self.parts, dim=1)


def _flat(bags: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
    return ids, torch.tensor([len(bag) for bag in bags])
