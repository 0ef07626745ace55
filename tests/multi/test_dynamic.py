"""Tables with raw ids: the ranks that hold them change nothing, and an id is itself wherever it goes."""

from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from tests.multi.harness import run_ranks
from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.errors import ConfigError, PlanError
from thresher.sharding.dynamic import check_dynamic
from thresher.sharding.model import shard
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan

ROWS, DIM, BATCH, STEPS = 64, 8, 8, 6
IDS = torch.tensor([0, 1, 5, 63, 64, 65, 1 << 40, (1 << 62) - 1, (1 << 62) - 2, -1, -(1 << 63), 977, 978, 979])
OPTIMIZER = TableOptimizer(name="rowwise_adagrad", lr=0.1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        table = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["a", "b"])
        self.bags = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
        self.top = nn.Linear(2 * DIM, 1)

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        return self.top(self.bags(ids).values()).squeeze(1)


def samples(step: int) -> tuple[list[list[int]], torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    bags = [IDS[torch.randint(len(IDS), (n % 4,), generator=generator)].tolist() for n in range(2 * BATCH)]
    return bags, torch.rand(BATCH, generator=generator)


def batch(step: int, rank: int, world: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    bags, labels = samples(step)
    mine = range(rank * BATCH // world, (rank + 1) * BATCH // world)
    parts = [bags[feature * BATCH + n] for feature in (0, 1) for n in mine]
    values = torch.tensor([i for part in parts for i in part], dtype=torch.int64)
    lengths = torch.tensor([len(part) for part in parts])
    return KeyedJaggedTensor(keys=["a", "b"], values=values, lengths=lengths), labels[mine.start : mine.stop]


def train(rank: int, world: int, kind: str, dynamic: DynamicTable, tiers: TierConfig | None) -> dict[str, Any]:
    plan = make_plan(
        Net(), world=world, local_world=world, device="cpu", optimizer=OPTIMIZER, tables={"t": kind}, tiers=tiers
    )
    sharded = shard(
        Net(), plan, device=torch.device("cpu"), optimizer=OPTIMIZER, seed=3, dynamic={"t": dynamic}, tiers=tiers
    )
    dense = torch.optim.SGD(list(sharded.dense_parameters().values()), lr=0.1)
    losses, outputs = [], []
    for step in range(STEPS):
        ids, labels = batch(step, rank, world)
        dense.zero_grad()
        loss = nn.functional.mse_loss(sharded.wrapped(ids), labels)
        loss.backward()
        sharded.step_tables()
        dense.step()
        losses.append(float(loss))
        with torch.no_grad():
            outputs.append(sharded.wrapped(batch(step + 50, rank, world)[0]))
    counts = [d.counts.as_dict() for k in sharded.held._kernels for d in k.group.dynamic.directories.values()]
    return {"losses": losses, "outputs": torch.stack(outputs), "counts": counts}


@pytest.mark.parametrize(
    "tiers",
    [None, TierConfig(budget="90%", flat_below_bytes=0), TierConfig(budget="100%")],
    ids=["no tiers", "tiers", "too small for tiers"],
)
def test_ranks_and_cuts_change_nothing(tiers: TierConfig | None) -> None:
    config = DynamicTable(min_count=2)
    (alone,) = run_ranks(1, train, "table_wise", config, tiers, timeout_s=120)
    assert alone["counts"][0]["admitted"] > 8
    for kind in ("row_wise", "table_wise"):
        ranks = run_ranks(2, train, kind, config, tiers, timeout_s=120)
        outputs = torch.cat([one["outputs"] for one in ranks], dim=1)
        torch.testing.assert_close(outputs, alone["outputs"], rtol=1e-5, atol=1e-6)
        admitted = sum(count["admitted"] for one in ranks for count in one["counts"])
        assert admitted == alone["counts"][0]["admitted"]


def test_a_full_table_takes_rows_back() -> None:
    (alone,) = run_ranks(1, full, timeout_s=120)
    assert alone["evicted"] > 0
    assert alone["rows"] <= 4


def full(rank: int, world: int) -> dict[str, int]:
    optimizer = TableOptimizer(name="sgd", lr=0.1)
    table = EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=DIM, feature_names=["a"])
    net = nn.Sequential()
    net.add_module("bags", EmbeddingBagCollection(tables=[table], device=torch.device("meta")))
    plan = make_plan(net, world=1, local_world=1, device="cpu", optimizer=optimizer, tables={"t": "table_wise"})
    sharded = shard(net, plan, device=torch.device("cpu"), optimizer=optimizer, seed=3, dynamic={"t": DynamicTable()})
    for step in range(6):
        ids = KeyedJaggedTensor(keys=["a"], values=torch.arange(2) + 100 * step, lengths=torch.tensor([1, 1]))
        vectors = sharded.wrapped(ids).values()
        assert vectors.abs().sum() > 0
        vectors.sum().backward()
        sharded.step_tables()
    (directory,) = sharded.held._kernels[0].group.dynamic.directories.values()
    return {"evicted": directory.counts.evicted, "rows": len(directory)}


def of_no_worth(rank: int, world: int) -> list[int]:
    """Ids that have rows after one, seen often, and another, seen once, made place for a third."""
    tiers = TierConfig(budget="100%")
    table = EmbeddingBagConfig(name="t", num_embeddings=2, embedding_dim=DIM, feature_names=["a"])
    net = nn.Sequential()
    net.add_module("bags", EmbeddingBagCollection(tables=[table], device=torch.device("meta")))
    plan = make_plan(net, world=1, local_world=1, device="cpu", optimizer=OPTIMIZER, tables={"t": "table_wise"})
    dynamic = {"t": DynamicTable(evict="priority")}
    sharded = shard(net, plan, device=torch.device("cpu"), optimizer=OPTIMIZER, seed=3, dynamic=dynamic, tiers=tiers)
    for ids in ([5, 5, 9], [5, 5, 5], [7, 7, 7]):
        sharded.wrapped(
            KeyedJaggedTensor(["a"], torch.tensor(ids), lengths=torch.ones(3).long())
        ).values().sum().backward()
        sharded.step_tables()
    (directory,) = sharded.held.directories().values()
    return sorted(directory.identity.tolist())


def test_rows_of_a_table_too_small_for_tiers_have_priorities() -> None:
    assert run_ranks(1, of_no_worth, timeout_s=60) == [[5, 7]]


def refused(rank: int, world: int) -> list[str]:
    plan = make_plan(Net(), world=1, local_world=1, device="cpu", optimizer=OPTIMIZER, tables={"t": "data_parallel"})
    said = []
    for dynamic in ({"t": DynamicTable()}, {"tt": DynamicTable()}, {"t": DynamicTable(evict="priority")}):
        try:
            shard(Net(), plan, device=torch.device("cpu"), optimizer=OPTIMIZER, seed=3, dynamic=dynamic)
        except (PlanError, ConfigError) as error:
            said.append(error.message)
    return said


def test_what_raw_ids_cannot_be_is_refused() -> None:
    (said,) = run_ranks(1, refused, timeout_s=60)
    assert said[0].startswith("PlanError: sharding.tables.t: table 'bags.t' has raw ids and cannot be data_parallel")
    assert "the model has no table 'tt'. Did you mean 't'" in said[1]
    assert "dynamic.t.evict: rows have priorities only with tiers" in said[2]


def cut(rows: int, *shards: int) -> Plan:
    """A table of ``rows`` rows cut into shards of so many."""
    rectangles = [
        {"rank": n, "row0": 0, "rows": each, "col0": 0, "cols": 8, "bytes": 0} for n, each in enumerate(shards)
    ]
    table = {"module": "bags", "table": "t", "rows": rows, "dim": 8, "sharding_type": "row_wise", "kernel": "fused"}
    return Plan.model_validate(
        {"world": len(shards), "local_world": len(shards), "tables": [table | {"shards": rectangles}]}
    )


def test_a_shard_without_rows_is_refused() -> None:
    check_dynamic(cut(7, 2, 2, 2, 1), {"t": DynamicTable()}, None)
    check_dynamic(cut(2, 1, 1, 0, 0), {}, None)
    with pytest.raises(PlanError) as told:
        check_dynamic(cut(2, 1, 1, 0, 0), {"t": DynamicTable()}, None)
    assert told.value.message == (
        "PlanError: sharding.tables.t: table 'bags.t' has raw ids, and 2 of its 4 shards have none of its 2 rows. "
        "Choose table_wise, or give the table more rows"
    )
