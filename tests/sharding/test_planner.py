"""Planning: what ``auto`` chooses, that every table has one place, and each refusal with its message."""

import os
import subprocess
import sys

import pytest
from torch import nn

from tests.sharding.models import bags, model, sequences
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.plan import tier_plan
from thresher.embeddings.tables import find_tables
from thresher.errors import ConfigError, PlanError
from thresher.sharding.check import check_plan
from thresher.sharding.cuts import BAG_TYPES, SEQUENCE_TYPES
from thresher.sharding.footprint import Footprint
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan, repriced
from thresher.sharding.translate import from_torchrec, to_torchrec

ADAGRAD = TableOptimizer(name="adagrad")


def plan_of(net: nn.Module, world: int = 4, local_world: int = 2, **settings: object) -> Plan:
    defaults = {"device": "cpu", "optimizer": TableOptimizer(), "memory_bytes": 1 << 30}
    return make_plan(net, world=world, local_world=local_world, **(defaults | settings))


def types_of(plan: Plan) -> dict[str, str]:
    return {table.path: table.sharding_type for table in plan.tables}


NET = model(bags=bags(tiny=(20, 16), large=(500_000, 16)), seqs=sequences(short=(20, 16), item=(300_000, 16)))


def test_auto_replicates_tiny_pooled_tables_and_never_cuts_columns() -> None:
    types = types_of(plan_of(NET))
    assert types["bags.tiny"] == "data_parallel"
    assert types["seqs.short"] == "table_wise"
    assert {types["bags.large"], types["seqs.item"]} <= {"table_wise", "row_wise", "table_row_wise"}


def test_auto_cuts_a_table_that_no_rank_could_hold() -> None:
    net = model(bags=bags(huge=(1_000_000, 64)))
    types = types_of(plan_of(net, memory_bytes=200_000_000))
    assert types["bags.huge"] in ("row_wise", "table_row_wise")


def test_ranks_share_the_load() -> None:
    net = model(bags=bags(**{f"t{n}": (100_000, 16) for n in range(8)}))
    plan = plan_of(net, default="table_wise")
    assert {plan.bytes_of(rank) for rank in range(4)} == {2 * 100_000 * (16 + 1) * 4}


@pytest.mark.parametrize(("world", "local_world"), [(1, 1), (2, 2), (4, 2), (4, 1), (4, 4), (8, 4)])
@pytest.mark.parametrize("kind", BAG_TYPES)
def test_every_type_yields_a_plan_that_passes_its_own_check(kind: str, world: int, local_world: int) -> None:
    sequence = kind if kind in SEQUENCE_TYPES else "table_wise"
    net = model(bags=bags(a=(1001, 32), b=(77, 64)), seqs=sequences(s=(64, 32)))
    plan = plan_of(net, world, local_world, default=kind, tables={"s": sequence}, optimizer=ADAGRAD)
    assert [table.path for table in plan.tables] == ["bags.a", "bags.b", "seqs.s"]
    assert types_of(plan) == {"bags.a": kind, "bags.b": kind, "seqs.s": sequence}
    for table in plan.tables:
        copies = world if kind == "data_parallel" and table.module == "bags" else 1
        assert sum(shard.rows * shard.cols for shard in table.shards) == copies * table.rows * table.dim
    infos = find_tables(net)
    check_plan(plan, infos, world, local_world, "test")
    assert from_torchrec(to_torchrec(plan, "cpu"), infos, Footprint(ADAGRAD), world, local_world) == plan


def test_bytes_count_weights_and_optimizer_state() -> None:
    net = model(bags=bags(a=(100, 16)))
    sizes = {
        name: plan_of(net, default="table_wise", optimizer=TableOptimizer(name=name)).tables[0].shards[0].bytes
        for name in ("sgd", "rowwise_adagrad", "adagrad")
    }
    assert sizes == {"sgd": 6400, "rowwise_adagrad": 6800, "adagrad": 12800}


TIERS = TierConfig(budget="40%", flat_below_bytes=0)


def test_tables_with_tiers_count_as_what_they_will_take() -> None:
    net = model(bags=bags(a=(10_000, 64), b=(10_000, 64)))
    plan = plan_of(net, default="row_wise", tiers=TIERS)
    fp32 = 10_000 * (64 + 1) * 4
    assert [table.tiers for table in plan.tables] == [("int8", "fp16", "fp32")] * 2
    assert sum(plan.bytes_of(rank) for rank in range(4)) == pytest.approx(0.4 * 2 * fp32, rel=1e-3)
    protected = plan_of(net, default="row_wise", tiers=TierConfig(budget="80%", flat_below_bytes=0, protect=("a",)))
    a, b = protected.tables
    assert a.tiers == ()
    assert sum(shard.bytes for shard in a.shards) == fp32
    assert sum(shard.bytes for shard in b.shards) == pytest.approx(0.6 * fp32, rel=1e-3)


def test_column_shards_each_count_their_headers() -> None:
    net = model(bags=bags(a=(10_000, 64)))
    least = TierConfig(budget="31%", flat_below_bytes=0)
    whole, cut = (plan_of(net, default=kind, tiers=least).tables[0] for kind in ("table_wise", "column_wise"))
    assert sum(shard.bytes for shard in whole.shards) == pytest.approx(0.31 * 10_000 * 65 * 4, rel=1e-3)
    assert [shard.bytes for shard in cut.shards] == [10_000 * (16 + 16)] * 4


@pytest.mark.parametrize(("name", "vectors"), [("adam", 2), ("ftrl", 2), ("adagrad", 1), ("rowwise_adam", 1)])
def test_state_of_vector_optimizers_counts_in_tiers(name: str, vectors: int) -> None:
    optimizer = TableOptimizer(name=name)
    footprint = Footprint(optimizer, tier_plan(find_tables(model(bags=bags(a=(1000, 64)))), TIERS_45, optimizer))
    full = 1000 * (64 * (1 + vectors) + optimizer.has_scalar) * 4
    assert Footprint(optimizer).shard_bytes("bags.a", 1000, 64) == full
    assert footprint.shard_bytes("bags.a", 1000, 64) == pytest.approx(max(0.45 * full, 1000 * (80 + 128 * vectors)))


TIERS_45 = TierConfig(budget="45%", flat_below_bytes=0)


def test_tiers_let_tables_fit_that_do_not_fit_in_fp32() -> None:
    net = model(bags=bags(a=(100_000, 64), b=(100_000, 64)))
    memory = {"memory_bytes": 15_000_000, "default": "table_wise", "world": 2, "local_world": 2}
    with pytest.raises(PlanError, match=r"needs 0\.026 GB on one of 2 ranks"):
        plan_of(net, **memory)
    plan = plan_of(net, **memory, tiers=TIERS)
    assert {table.shards[0].rank for table in plan.tables} == {0, 1}


def test_the_planner_counts_optimizer_state_where_it_places_tables() -> None:
    net = model(bags=bags(a=(100_000, 64), b=(100_000, 64)))
    memory = {"memory_bytes": 80_000_000, "default": "table_wise", "world": 1, "local_world": 1}
    assert plan_of(net, **memory).tables
    with pytest.raises(PlanError, match=r"no placement of 2 tables \(0\.154 GB in all"):
        plan_of(net, **memory, optimizer=TableOptimizer(name="adam"))


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot take less than"):
        plan_of(model(bags=bags(a=(10_000, 64))), tiers=TierConfig(budget="10%", flat_below_bytes=0))


def test_a_saved_plan_takes_the_bytes_and_tiers_of_the_run() -> None:
    net = model(bags=bags(a=(10_000, 64), b=(10_000, 64)))
    plain = plan_of(net, default="column_wise")
    separate = TableOptimizer(column_state="separate")
    assert repriced(plain, net, TableOptimizer(), TIERS) == plan_of(net, default="column_wise", tiers=TIERS)
    assert repriced(plain, net, separate, None) == plan_of(net, default="column_wise", optimizer=separate)


def test_what_column_cuts_change_is_noted() -> None:
    net = model(bags=bags(a=(100, 16), b=(100, 16)))
    settings = {"tables": {"a": "column_wise"}, "default": "table_wise"}
    assert plan_of(net, **settings).notes == ()
    separate = TableOptimizer(column_state="separate")
    assert "in tables bags.a: results differ" in plan_of(net, **settings, optimizer=separate).notes[0]
    assert plan_of(net, **settings, optimizer=TableOptimizer(name="adagrad", column_state="separate")).notes == ()
    (note,) = plan_of(net, **settings, tiers=TierConfig(budget="90%", flat_below_bytes=0)).notes
    assert "a scale for each column shard in tables bags.a" in note


def test_tables_of_one_name_in_two_collections_are_planned_apart() -> None:
    plan = plan_of(model(one=bags(user=(20, 16)), two=sequences(user=(30, 16))))
    assert [(table.path, table.rows) for table in plan.tables] == [("one.user", 20), ("two.user", 30)]


def test_a_model_without_tables_has_an_empty_plan() -> None:
    assert plan_of(model(top=nn.Linear(2, 1))).tables == ()


REFUSALS = [
    ({"default": "rowwise"}, 4, 2, "sharding.default: 'rowwise' is no sharding type. Did you mean 'row_wise'"),
    ({"tables": {"tiny": "grid"}}, 4, 2, "sharding.tables.tiny: 'grid' is no sharding type. Did you mean 'grid_shard'"),
    ({"tables": {"tinny": "row_wise"}}, 4, 2, "no table 'tinny'. Did you mean 'tiny'"),
    (
        {"tables": {"few": "row_wise"}},
        4,
        2,
        "'bags.few' cannot be row_wise on 4 ranks (2 per machine): its 3 rows leave",
    ),
    (
        {"tables": {"few": "table_row_wise"}},
        4,
        4,
        "its 3 rows leave some of 4 ranks without a row. Choose one of data_p",
    ),
    ({"tables": {"odd": "column_wise"}}, 4, 2, "its 4 columns cannot be cut into equal parts of a multiple of 4"),
    (
        {"tables": {"odd": "grid_shard"}},
        4,
        2,
        "'bags.odd' cannot be grid_shard on 4 ranks (2 per machine): its 4 co",
    ),
    (
        {"tables": {"odd": "table_column_wise"}},
        4,
        2,
        "Choose one of data_parallel, table_wise, row_wise, table_row_wise",
    ),
    (
        {"tables": {"narrow": "row_wise"}},
        4,
        2,
        "its 10 columns are no multiple of 4, as FBGEMM's fused kernels need them",
    ),
    ({"tables": {"narrow": "table_wise"}}, 1, 1, "Choose one of data_parallel, or auto"),
    (
        {"tables": {"item": "data_parallel"}},
        4,
        2,
        "data-parallel EmbeddingCollection does not train on CPU. Choose one",
    ),
    ({"tables": {"item": "grid_shard"}}, 4, 2, "TorchRec has it for pooled tables (EmbeddingBagCollection) only"),
    ({"default": "grid_shard"}, 4, 2, "sharding.default: table 'seqs.item' cannot be grid_shard"),
    ({}, 4, 3, "4 ranks do not divide into machines of 3. Start the same number of ranks on every machine"),
    (
        {"tables": {"large": "table_wise"}, "memory_bytes": 20_000_000},
        4,
        2,
        "'bags.large' (500000 x 16) as table_wise needs 0.034 GB on one of 4 ranks, which have 0.02 GB each for tables",
    ),
    ({"memory_bytes": 13_000_000}, 4, 2, "no placement of"),
]


@pytest.mark.parametrize(("settings", "world", "local_world", "message"), REFUSALS, ids=lambda v: str(v)[:40])
def test_what_does_not_fit_is_refused(settings: dict[str, object], world: int, local_world: int, message: str) -> None:
    pooled = bags(tiny=(20, 16), few=(3, 16), odd=(50, 4), narrow=(50, 10), large=(500_000, 16))
    net = model(seqs=sequences(item=(300_000, 16)), bags=pooled)
    with pytest.raises(PlanError) as caught:
        plan_of(net, world, local_world, **settings)
    assert message in str(caught.value)


def test_auto_refuses_large_tables_that_it_could_only_replicate() -> None:
    with pytest.raises(PlanError, match="multiple of 4, or set it to data_parallel"):
        plan_of(model(bags=bags(wide=(50_000, 10))))
    with pytest.raises(PlanError, match=r"Make its dim a multiple of 4$"):
        plan_of(model(seqs=sequences(short=(5, 10))))
    with pytest.raises(PlanError, match=r"cannot be row_wise .* Make its dim a multiple of 4$"):
        plan_of(model(seqs=sequences(short=(5, 10))), default="row_wise")


def test_one_collection_under_two_names_is_refused() -> None:
    shared = bags(a=(100, 16))
    with pytest.raises(PlanError, match="Use each collection of tables once"):
        plan_of(model(one=shared, two=shared), default="table_wise")


def test_memory_defaults_to_what_the_machine_has() -> None:
    assert plan_of(NET, memory_bytes=0).tables
    with pytest.raises(PlanError, match=r"needs 2\.05e\+05 GB"):
        plan_of(model(bags=bags(absurd=(10**11, 512))), memory_bytes=0, default="table_wise")


SCRIPT = "from tests.sharding.test_planner import NET, plan_of; print(plan_of(NET).model_dump_json())"


@pytest.mark.slow
def test_processes_with_other_string_hashes_make_the_same_plan() -> None:
    texts = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1
