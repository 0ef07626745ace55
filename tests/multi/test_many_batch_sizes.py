"""Batches of different size per feature (TorchRec's VBE): pooled over several kernels, forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from tests.multi.harness import run_ranks
from thresher.embeddings.init import init_tables
from thresher.embeddings.optimizers import TableOptimizer
from thresher.sharding.model import shard
from thresher.sharding.planner import make_plan

BATCH, ROWS = 4, 20
WIDTHS = {"a": 8, "b": 16, "c": 8}
DISTINCT = {"a": 2, "b": 3, "c": 4}
"""Bags of each feature on rank 0; rank 1 has one more of each, which samples share by their inverse indices."""


class Net(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        pooling = {"a": PoolingType.SUM, "b": PoolingType.MEAN, "c": PoolingType.SUM}
        configs = [
            EmbeddingBagConfig(
                name=f"t{key}", num_embeddings=ROWS, embedding_dim=dim, feature_names=[key], pooling=pooling[key]
            )
            for key, dim in WIDTHS.items()
        ]
        self.bags = EmbeddingBagCollection(configs, device=torch.device(device))


def features(rank: int) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """The same samples with distinct bags once, and written out."""
    generator = torch.Generator().manual_seed(rank)
    strides = [DISTINCT[key] + rank for key in WIDTHS]
    bags = [
        [torch.randint(0, ROWS, (int(n),), generator=generator) for n in torch.randint(0, 4, (s,), generator=generator)]
        for s in strides
    ]
    inverse = torch.stack([torch.randint(0, s, (BATCH,), generator=generator) for s in strides])
    once = KeyedJaggedTensor(
        list(WIDTHS),
        torch.cat([bag for each in bags for bag in each]),
        lengths=torch.tensor([len(bag) for each in bags for bag in each]),
        stride_per_key_per_rank=[[s] for s in strides],
        inverse_indices=(list(WIDTHS), inverse),
    )
    chosen = [bags[f][int(i)] for f in range(len(strides)) for i in inverse[f]]
    return once, KeyedJaggedTensor(list(WIDTHS), torch.cat(chosen), lengths=torch.tensor([len(b) for b in chosen]))


def compared(rank: int, world: int, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Vectors from distinct bags less those of an unsharded collection; rows after a step less the same."""
    optimizer = TableOptimizer(name="sgd", lr=0.5)
    plan = make_plan(Net("meta"), world=world, local_world=world, device="cpu", optimizer=optimizer, default=kind)
    model = shard(Net("meta"), plan, device=torch.device("cpu"), optimizer=optimizer, seed=3)
    whole = Net("cpu")
    init_tables(whole, 3)
    once, written = features(rank)
    vectors = model.wrapped.module.bags(once).to_dict()
    found = torch.cat([vectors[key] for key in WIDTHS], dim=1)
    difference = found.detach() - whole.bags(written).values().detach()
    scale = torch.arange(1.0, BATCH + 1).unsqueeze(1)
    (found * scale).sum().backward()
    for other in range(world):
        (whole.bags(features(other)[1]).values() * scale).sum().backward()
    rows = []
    for table in model.tables():
        weight = whole.bags.embedding_bags[table.name].weight
        stepped = (weight - optimizer.lr * weight.grad / world).detach()
        own = (slice(table.row0, table.row0 + table.storage.rows), slice(table.col0, table.col0 + table.storage.dim))
        rows.append(table.storage.weights - stepped[own])
    return difference, rows


@pytest.mark.parametrize("kind", ["table_wise", "column_wise"])
def test_distinct_bags_give_the_vectors_and_rows_of_all_bags(kind: str) -> None:
    ranks = run_ranks(2, compared, kind, timeout_s=60)
    assert sum(len(rows) for _, rows in ranks) >= 3
    for difference, rows in ranks:
        assert difference.shape == (BATCH, sum(WIDTHS.values()))
        assert difference.abs().max() < 1e-6
        assert all(left.abs().max() < 1e-6 for left in rows)
