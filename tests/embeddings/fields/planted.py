"""A click set whose fields matter by plan: strong to weak, two that say the same, and one that says nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from thresher.embeddings.fields.field import Field, find_fields
from thresher.embeddings.tables import find_tables

STRENGTH = {f"f{n:02d}": 1.6 * 0.72**n for n in range(10)}
TWINS = ("twin_a", "twin_b")
NOISE = "noise"
KEYS = [*STRENGTH, *TWINS, NOISE]
ROWS, DIM = 20, 8
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Clicks:
    """[B] ids by key, labels [B]."""

    ids: dict[str, Tensor]
    labels: Tensor

    @property
    def sparse(self) -> KeyedJaggedTensor:
        values = torch.cat([self.ids[key] for key in KEYS])
        return KeyedJaggedTensor(KEYS, values, lengths=torch.ones(len(values), dtype=torch.int64))

    def part(self, rows: slice) -> "Clicks":
        return Clicks({key: ids[rows] for key, ids in self.ids.items()}, self.labels[rows])


def clicks(samples: int, seed: int) -> Clicks:
    """``twin_b`` is ``twin_a`` in nine of ten samples; both tell of the same cause."""
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(len(KEYS), ROWS, generator=torch.Generator().manual_seed(77))
    effects = (effects - effects.mean(1, keepdim=True)) / effects.std(1, keepdim=True)
    ids = {key: torch.randint(0, ROWS, (samples,), generator=generator) for key in KEYS}
    same = torch.rand(samples, generator=generator) < 0.9
    ids["twin_b"] = torch.where(same, ids["twin_a"], ids["twin_b"])
    strength = STRENGTH | {"twin_a": 0.9}
    logits = sum(s * effects[KEYS.index(key)][ids[key]] for key, s in strength.items())
    return Clicks(ids, (torch.rand(samples, generator=generator) < torch.sigmoid(logits)).float())


class Net(nn.Module):
    """A perceptron over pooled vectors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        tables = [
            EmbeddingBagConfig(name=f"t_{key}", num_embeddings=ROWS, embedding_dim=DIM, feature_names=[key])
            for key in KEYS
        ]
        self.bags = EmbeddingBagCollection(tables, device=CPU)
        for weight in self.bags.parameters():
            nn.init.normal_(weight, std=0.05)
        self.top = nn.Sequential(nn.Linear(DIM * len(KEYS), 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, sparse: KeyedJaggedTensor) -> Tensor:
        logits: Tensor = self.top(self.bags(sparse).values())[:, 0]
        return logits

    def fields(self) -> tuple[Field, ...]:
        return find_fields(find_tables(self))


def loss_of(net: Net, sparse: KeyedJaggedTensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(net(sparse), labels)


def trained(seed: int, samples: int = 40_000, size: int = 500, passes: int = 2) -> Net:
    net, data = Net(seed), clicks(samples, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    for _ in range(passes):
        for first in range(0, samples, size):
            part = data.part(slice(first, first + size))
            optimizer.zero_grad()
            loss_of(net, part.sparse, part.labels).backward()
            optimizer.step()
    return net
