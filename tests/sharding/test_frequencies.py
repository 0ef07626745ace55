"""Measured lookups: what is counted, and that placement follows it."""

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from tests.sharding.models import META, bags, model
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.tables import TableInfo, find_tables
from thresher.sharding.frequencies import Frequency, measure_frequencies
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan
from thresher.sharding.show import plan_text


def batch(**features: list[list[int]]) -> KeyedJaggedTensor:
    lengths = [len(bag) for bags in features.values() for bag in bags]
    values = [row for bags in features.values() for bag in bags for row in bag]
    return KeyedJaggedTensor(list(features), torch.tensor(values, dtype=torch.int64), lengths=torch.tensor(lengths))


TABLE = TableInfo("bags", "item", rows=8, dim=4, pooled=True, features=("seen", "bought"))
OTHER = TableInfo("bags", "user", rows=8, dim=4, pooled=True, features=("user",))


def test_lookups_distinct_rows_and_skew_are_counted() -> None:
    batches = [batch(seen=[[0, 0, 1], []], bought=[[0], [7]]), batch(seen=[[0], [0]], bought=[[], [6]])]
    found = measure_frequencies(batches, [TABLE, OTHER])
    assert list(found) == ["bags.item"]
    item = found["bags.item"]
    assert item.lookups == (5 / 4, 3 / 4)
    assert item.distinct == (3 + 2) / 8
    assert item.head == 5 / 8
    assert item.blocks == (5 / 8, 1 / 8, 0, 0, 0, 0, 1 / 8, 1 / 8)


def test_shares_of_rows_follow_the_blocks() -> None:
    found = Frequency(lookups=(1.0,), distinct=1, head=0, blocks=(0.5, 0.25, 0.25, 0.0))
    assert found.share(0, 50, 100) == pytest.approx(0.75)
    assert found.share(50, 50, 100) == pytest.approx(0.25)
    assert found.share(10, 30, 100) == pytest.approx(0.3 + 0.15)
    assert sum(found.share(row, 7, 70) for row in range(0, 70, 7)) == pytest.approx(1)


def plan_of(net: torch.nn.Module, frequencies: dict[str, Frequency] | None, **settings: object) -> Plan:
    fixed = {"world": 2, "local_world": 2, "device": "cpu", "optimizer": TableOptimizer(), "memory_bytes": 1 << 30}
    return make_plan(net, **(fixed | settings), frequencies=frequencies)


def frequency(lookups: float, blocks: tuple[float, ...] = (1.0,)) -> Frequency:
    return Frequency(lookups=(lookups,), distinct=1, head=0, blocks=blocks)


def lookups_by_rank(plan: Plan, found: dict[str, Frequency]) -> list[float]:
    """Lookups a sample of tables that are placed whole."""
    loads = [0.0] * plan.world
    for table in plan.tables:
        loads[table.shards[0].rank] += sum(found[table.path].lookups)
    return loads


def test_a_table_read_often_gets_a_rank_of_its_own() -> None:
    """By size, four equal tables are two and two; by lookups, three cold ones balance one hot one."""
    net = model(bags=bags(**{f"t{n}": (10_000, 16) for n in range(4)}))
    found = {f"bags.t{n}": frequency(30.0 if n == 1 else 1.0) for n in range(4)}
    blind, seeing = (plan_of(net, known, default="table_wise") for known in (None, found))
    assert sorted(lookups_by_rank(blind, found)) == [2, 31]
    assert sorted(lookups_by_rank(seeing, found)) == [3, 30]
    assert "30" in plan_text(seeing)
    assert "to top 1%" in plan_text(seeing)
    assert "to top 1%" not in plan_text(blind)


def test_frequent_rows_side_by_side_keep_auto_from_cutting_rows() -> None:
    net = model(bags=bags(a=(200_000, 64)))
    for blocks, kind in (((0.5, 0.5), "row_wise"), ((0.9, 0.1), "table_wise")):
        (table,) = plan_of(net, {"bags.a": frequency(1.0, blocks)}).tables
        assert table.sharding_type == kind


def test_several_features_of_a_table_all_count() -> None:
    net = model(
        bags=EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name="item", num_embeddings=10_000, embedding_dim=16, feature_names=["seen", "bought"]
                ),
                *(
                    EmbeddingBagConfig(name=n, num_embeddings=10_000, embedding_dim=16, feature_names=[n])
                    for n in ("u", "v", "w")
                ),
            ],
            device=META,
        )
    )
    ids = batch(seen=[[1] * 20], bought=[[2] * 20], u=[[1]], v=[[1]], w=[[1]])
    found = measure_frequencies([ids], find_tables(net))
    assert sorted(lookups_by_rank(plan_of(net, found, default="table_wise"), found)) == [3, 40]
