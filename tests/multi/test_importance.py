"""The importance of each sample reaches the rows it looked up, whatever order a sharding type gives the ranks."""

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from tests.multi.harness import run_ranks
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.rows.tiered import TieredTable
from thresher.sharding.cuts import BAG_TYPES, SEQUENCE_TYPES
from thresher.sharding.model import shard
from thresher.sharding.planner import make_plan

ROWS, DIM, DECAY = 64, 32, 0.25
TIERS = TierConfig(budget="100%", flat_below_bytes=0, decay=DECAY)
KINDS = tuple(kind for kind in BAG_TYPES if kind != "data_parallel")


def importance_of(row: Tensor) -> Tensor:
    return 1.0 + row


def priorities(rank: int, world: int, local_world: int, kinds: list[str], sizes: list[int]) -> list[list[Tensor]]:
    """For each type what this rank's rows have beyond their importance: each sample reads the row of its number."""
    first = sum(sizes[:rank])
    own = torch.arange(first, first + sizes[rank])
    ids = KeyedJaggedTensor(["a", "s"], own.repeat(2), lengths=torch.ones(2 * len(own), dtype=torch.int64))
    return [_left_over(kind, world, local_world, ids, own, sum(sizes)) for kind in kinds]


def _left_over(
    kind: str, world: int, local_world: int, ids: KeyedJaggedTensor, own: Tensor, samples: int
) -> list[Tensor]:
    bag = EmbeddingBagConfig(name="a", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["a"])
    each = EmbeddingConfig(name="s", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["s"])
    meta = torch.device("meta")
    net = nn.ModuleDict(
        {"bags": EmbeddingBagCollection([bag], device=meta), "seqs": EmbeddingCollection([each], device=meta)}
    )
    optimizer = TableOptimizer(name="sgd")
    plan = make_plan(
        net,
        world=world,
        local_world=local_world,
        device="cpu",
        optimizer=optimizer,
        default=kind,
        tables={"s": kind if kind in SEQUENCE_TYPES else "table_wise"},
        tiers=TIERS,
        memory_bytes=1 << 30,
    )
    model = shard(net, plan, device=torch.device("cpu"), optimizer=optimizer, seed=0, tiers=TIERS)
    model.observe(importance_of(own))
    pooled = model.wrapped.module["bags"](ids).values()
    single = model.wrapped.module["seqs"](ids)["s"].values()
    (pooled.sum() + single.sum()).backward()
    left = []
    for table in model.tables():
        assert isinstance(table.storage, TieredTable)
        row = torch.arange(table.row0, table.row0 + table.storage.rows)
        wanted = torch.where(row < samples, DECAY * importance_of(row), 0.0)
        left.append(table.storage.stat[:, 1] / table.storage.gain - wanted)
    return left


@pytest.mark.parametrize(("world", "local_world"), [(2, 2), (4, 2)])
def test_every_row_gets_the_importance_of_its_sample(world: int, local_world: int) -> None:
    ranks = run_ranks(world, priorities, local_world, list(KINDS), [5] * world, timeout_s=90, local_world=local_world)
    assert any(rank[0] for rank in ranks)
    for rank in ranks:
        for left in rank:
            assert all(float(part.abs().max()) < 1e-5 for part in left)


def test_so_it_does_where_ranks_have_batches_of_different_sizes() -> None:
    kinds = ["table_wise", "column_wise"]
    for rank in run_ranks(2, priorities, 2, kinds, [3, 7], timeout_s=60):
        for left in rank:
            assert all(float(part.abs().max()) < 1e-5 for part in left)


def followed(rank: int, world: int, follow: bool) -> tuple[list[float], list[int]]:
    """Priorities added to row r in step r, of which only the second one is told its importance; steps ended by then."""
    bag = EmbeddingBagConfig(name="a", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["a"])
    net = nn.ModuleDict({"bags": EmbeddingBagCollection([bag], device=torch.device("meta"))})
    optimizer = TableOptimizer(name="sgd")
    plan = make_plan(
        net, world=1, local_world=1, device="cpu", optimizer=optimizer, tables={"a": "table_wise"}, tiers=TIERS
    )
    model = shard(net, plan, device=torch.device("cpu"), optimizer=optimizer, seed=0, tiers=TIERS)
    assert model.held is not None
    assert model.tiers is not None
    bags = model.wrapped.module["bags"]
    if follow:
        model.held.follow(bags)
    (table,) = model.tables()
    assert isinstance(table.storage, TieredTable)
    added, ended = [], []
    for step in range(4):
        if step == 1:
            model.observe(torch.tensor([7.0]))
        bags(KeyedJaggedTensor(["a"], torch.tensor([step]), lengths=torch.tensor([1]))).values().sum().backward()
        added.append(float(table.storage.stat[step, 1] / table.storage.gain) / DECAY)
        ended.append(model.tiers.step)
        if not follow:
            model.step_tables()
    return added, ended


@pytest.mark.parametrize("follow", [False, True], ids=["step", "follow"])
def test_what_a_step_was_told_does_not_count_in_the_next(follow: bool) -> None:
    ((added, ended),) = run_ranks(1, followed, follow, timeout_s=60)
    assert added == pytest.approx([1.0, 7.0, 1.0, 1.0])
    assert ended == [0, 1, 2, 3]
