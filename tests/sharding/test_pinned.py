"""Plans on disk, and every way in which a pinned plan may not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sharding.models import bags, model, sequences
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.tables import find_tables
from thresher.errors import PlanError
from thresher.sharding.check import check_plan
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan
from thresher.sharding.show import plan_text, readable

NET = model(bags=bags(a=(101, 32), b=(77, 16), c=(50, 32)), seqs=sequences(s=(40, 16)))
TYPES = {"a": "row_wise", "b": "table_row_wise", "c": "table_column_wise", "s": "table_wise"}


def plan() -> Plan:
    return make_plan(
        NET,
        world=4,
        local_world=2,
        device="cpu",
        optimizer=TableOptimizer(),
        tables=TYPES,
        memory_bytes=1 << 30,
    )


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    loaded = Plan.load(path)
    assert loaded == plan()
    check_plan(loaded, find_tables(NET), 4, 2, str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory. Give a plan.json saved by a run"),
        ("{", "holds no sharding plan: : Invalid JSON"),
        ("[]", "holds no sharding plan"),
        ('{"world": 0, "local_world": 1, "tables": []}', "world: Input should be greater than or equal to 1"),
        ('{"world": 1, "local_world": 1, "tables": [], "x": 1}', "x: Extra inputs are not permitted"),
    ],
)
def test_a_file_that_holds_no_plan_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(table for table in values["tables"] if table["table"] == name)


def _swap_ranks(values: dict[str, Any]) -> None:
    shards = _table(values, "a")["shards"]
    shards[0]["rank"], shards[1]["rank"] = 1, 0


def _spread_over_machines(name: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for rank, shard in zip((1, 2), _table(values, name)["shards"], strict=True):
            shard["rank"] = rank

    return change


MISFITS = [
    (lambda v: v.update(world=2), "the plan is for 2 ranks (2 per machine), there are 4 (2). Start 2 ranks"),
    (lambda v: v.update(local_world=4), "the plan is for 4 ranks (4 per machine), there are 4 (2)"),
    (lambda v: v["tables"].pop(0), "table 'bags.a' stands in the plan 0 times, in the model 1 times"),
    (lambda v: v["tables"].append(v["tables"][0]), "table 'bags.a' stands in the plan 2 times, in the model 1 times"),
    (lambda v: _table(v, "a").update(table="z"), "the model has no table 'bags.z'"),
    (lambda v: _table(v, "a").update(rows=102), "table 'bags.a' is 102 x 32 in the plan, 101 x 32 in the model"),
    (lambda v: _table(v, "s").update(sharding_type="grid_shard"), "'seqs.s' cannot be grid_shard: TorchRec has it for"),
    (lambda v: _table(v, "a").update(kernel="dense"), "has kernel dense, which row_wise does not take"),
    (lambda v: _table(v, "a").update(sharding_type="auto"), "has shards 32 columns wide of type auto"),
    (lambda v: _table(v, "a").update(sharding_type="table_wise"), "is not cut as table_wise cuts it on 4 ranks"),
    (lambda v: _table(v, "a")["shards"].pop(), "is not cut as row_wise cuts it on 4 ranks"),
    (lambda v: _table(v, "s")["shards"][0].update(cols=15), "has shards 15 columns wide"),
    (
        lambda v: _table(v, "s")["shards"][0].update(rank=4),
        "'seqs.s' is placed on ranks [4], which table_wise does not",
    ),
    (_swap_ranks, "'bags.a' is placed on ranks [1, 0, 2, 3], which row_wise does not allow"),
    (_spread_over_machines("b"), "'bags.b' is placed on ranks [1, 2], which table_row_wise does not allow"),
    (_spread_over_machines("c"), "'bags.c' is placed on ranks [1, 2], which table_column_wise does not allow"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=[message[-40:] for _, message in MISFITS])
def test_a_pinned_plan_that_does_not_fit_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    values = plan().model_dump(mode="json")
    change(values)
    with pytest.raises(PlanError) as caught:
        check_plan(Plan.model_validate(values), find_tables(NET), 4, 2, "old.json")
    assert message in str(caught.value)
    assert "old.json: " in str(caught.value)


def test_the_printed_plan_names_tables_types_ranks_shards_and_totals() -> None:
    noted = plan().model_copy(update={"notes": ("mind the gap",)})
    lines = plan_text(noted).splitlines()
    (row,) = (line for line in lines if "101 x 32" in line)
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells == ["a", "101 x 32", "fp32", "row_wise", "0-3", "3 of 26 x 32, 1 of 23 x 32", "13.3 kB"]
    (whole,) = (line for line in lines if "40 x 16" in line)
    assert "whole" in whole
    totals = [line for line in lines if "rank " in line]
    assert len(totals) == 4
    assert readable(noted.bytes_of(0)) in totals[0]
    assert lines[-1] == "note: mind the gap"


def test_bytes_are_readable() -> None:
    sizes = [0, 999, 1536, 2_500_000, 3 * 10**12]
    assert [readable(size) for size in sizes] == ["0 B", "999 B", "1.5 kB", "2.5 MB", "3.0 TB"]
