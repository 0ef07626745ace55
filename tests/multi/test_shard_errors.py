"""What ``shard`` refuses, and models of unusual make: no tables, no dense part, dense layers on the meta device."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from tests.multi.harness import run_ranks
from tests.sharding.models import bags, model
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.errors import BadIds, PlanError
from thresher.sharding.model import ShardedModel, shard
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan

CPU = torch.device("cpu")
OPTIMIZER = TableOptimizer()


def _plan(net: nn.Module, world: int, local_world: int) -> Plan:
    return make_plan(net, world=world, local_world=local_world, device="cpu", optimizer=OPTIMIZER, memory_bytes=1 << 30)


def _shard(net: nn.Module, plan: Plan) -> ShardedModel:
    return shard(net, plan, device=CPU, optimizer=OPTIMIZER, seed=0)


def for_another_world(rank: int, world: int) -> None:
    _shard(model(bags=bags(a=(50, 8))), _plan(model(bags=bags(a=(50, 8))), 2, 2))


def told_of_other_machines(rank: int, world: int) -> None:
    net = model(bags=bags(a=(50, 8)))
    _shard(net, _plan(net, 2, 2))


def dense_on_meta(rank: int, world: int) -> None:
    net = model(bags=bags(a=(50, 8)), top=nn.Linear(2, 1, device="meta"))
    _shard(net, _plan(net, 1, 1))


def unusual(rank: int, world: int) -> list[list[str]]:
    """Dense parameters of models without tables, without a dense part, and with a frozen one."""
    frozen = nn.Linear(2, 1).requires_grad_(False)
    nets = [model(top=nn.Linear(2, 1)), model(bags=bags(a=(50, 8))), model(bags=bags(a=(50, 8)), top=frozen)]
    return [sorted(_shard(net, _plan(net, world, world)).dense_parameters()) for net in nets]


def dense_weights(rank: int, world: int) -> tuple[float, float]:
    """A parameter and a buffer of the dense part, drawn from another seed on each rank."""
    torch.manual_seed(rank)
    net = model(bags=bags(a=(50, 8)), top=nn.Linear(2, 1))
    net["top"].register_buffer("offset", torch.rand(1))
    sharded = _shard(net, _plan(net, world, world))
    top = sharded.wrapped.module["top"]
    return float(top.weight[0, 0].detach()), float(top.offset)


def id_outside(rank: int, world: int, kind: str, row: int) -> None:
    net = model(bags=bags(a=(51, 8)))
    plan = make_plan(net, world=world, local_world=world, device="cpu", optimizer=OPTIMIZER, default=kind)
    ids = KeyedJaggedTensor(["a"], torch.tensor([1, row]), lengths=torch.tensor([1, 1]))
    _shard(net, plan).wrapped.module["bags"](ids).values().sum().backward()


def copied(rank: int, world: int) -> int:
    """Shards a table with tiers beside one that every rank holds, which alone is almost as large as the budget."""
    rows = {"big": 10_000, "copied": 4_000}
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=count, embedding_dim=64, feature_names=[name])
        for name, count in rows.items()
    ]
    net = nn.Sequential()
    net.add_module("bags", EmbeddingBagCollection(tables=tables, device=torch.device("meta")))
    tiers = TierConfig(budget="1.2MB", flat_below_bytes=0, protect=("copied",))
    kinds = {"big": "table_wise", "copied": "data_parallel"}
    plan = make_plan(net, world=1, local_world=1, device="cpu", optimizer=OPTIMIZER, tables=kinds, tiers=tiers)
    sharded = shard(net, plan, device=torch.device("cpu"), optimizer=OPTIMIZER, seed=0, tiers=tiers)
    assert sharded.tiers is not None
    return sharded.tiers.ledger().flat_bytes


def test_tables_that_every_rank_holds_need_no_room_in_the_budget() -> None:
    assert run_ranks(1, copied, timeout_s=60) == [0]


@pytest.mark.parametrize(
    ("kind", "row"), [("table_wise", 51), ("row_wise", 52), ("row_wise", -1), ("data_parallel", 51)]
)
def test_an_id_outside_its_table_stops_the_run(kind: str, row: int) -> None:
    with pytest.raises((BadIds, RuntimeError), match=r"id -?\d+ at position|out of bounds"):
        run_ranks(2, id_outside, kind, row, timeout_s=60)


def test_without_a_process_group_it_says_what_to_do() -> None:
    net = model(bags=bags(a=(50, 8)))
    with pytest.raises(PlanError, match=r"Call torch\.distributed\.init_process_group, also for one rank"):
        _shard(net, _plan(net, 1, 1))


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="plan is for 2 ranks \\(2 per machine\\), there are 1 \\(1\\)"):
        run_ranks(1, for_another_world, timeout_s=60)


def test_a_plan_for_other_machines_than_torchrec_is_told_of_is_refused() -> None:
    with pytest.raises(PlanError, match="plan is for 2 ranks \\(2 per machine\\), there are 2 \\(1\\)"):
        run_ranks(2, told_of_other_machines, timeout_s=60, local_world=1)


def test_dense_layers_that_nothing_would_initialise_are_refused() -> None:
    with pytest.raises(PlanError, match=r"'top\.weight' is on the meta device"):
        run_ranks(1, dense_on_meta, timeout_s=60)


def test_models_without_tables_or_without_a_dense_part_work() -> None:
    assert run_ranks(2, unusual, timeout_s=60) == [[["top.bias", "top.weight"], [], ["top.bias", "top.weight"]]] * 2


def test_all_ranks_start_from_the_dense_weights_of_rank_0() -> None:
    first, second = run_ranks(2, dense_weights, timeout_s=60)
    assert first == second
