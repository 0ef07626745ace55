"""Tables with tiers are the same rows whatever ranks hold them: to the last bit, through promotions, demotions and
rebalances, under every sharding type on 1, 2 and 4 ranks."""

from functools import cache

import pytest
import torch

from tests.multi.harness import run_ranks
from tests.multi.tiers_twin import Case, Outcome, Part, Whole, assembled, train_all
from thresher.embeddings.rows.tiers import Tier
from thresher.sharding.cuts import COLUMN_TYPES

PATHS = ("bags.shared", "bags.alone", "bags.plain", "heavy.weighted", "single.item")
RANKS = ((1, 1), (2, 2), (4, 2))
ROW_CASES = [
    Case("table_wise", "table_wise"),
    Case("row_wise", "row_wise"),
    Case("table_row_wise", "row_wise"),
    Case("row_wise", "row_wise", "adam"),
]
OPTIMIZERS = ("sgd", "adagrad", "rowwise_adam", "ftrl")
COLUMN_BUDGET = "75%"
"""Column shards have headers of their own."""


@cache
def outcomes(world: int, local_world: int, *cases: Case) -> dict[Case, list[Outcome]]:
    ranks = run_ranks(world, train_all, local_world, list(cases), timeout_s=280, local_world=local_world)
    return {case: [rank[number] for rank in ranks] for number, case in enumerate(cases)}


@cache
def whole(optimizer: str, budget: str) -> Whole:
    return Whole(optimizer, budget).train()


def assert_same(found: Part, wanted: Part, path: str) -> None:
    assert torch.equal(found.tier, wanted.tier), path
    assert torch.equal(found.stat, wanted.stat), path
    assert torch.equal(found.values, wanted.values), path


@pytest.mark.parametrize(("world", "local_world"), RANKS)
@pytest.mark.parametrize("case", ROW_CASES, ids=lambda case: f"{case.kind}-{case.optimizer}")
def test_rows_are_those_of_whole_tables(world: int, local_world: int, case: Case) -> None:
    ranks, reference = outcomes(world, local_world, *ROW_CASES)[case], whole(case.optimizer, case.budget)
    for path in PATHS:
        assert_same(assembled(ranks, path), reference.parts()[path], path)


def test_rows_moved_both_ways_and_all_tiers_are_in_use() -> None:
    twin = whole("rowwise_adagrad", "60%")
    assert twin.controller.moves.promoted > 50
    assert twin.controller.moves.demoted > 50
    used = torch.cat([part.tier for path, part in twin.parts().items() if path != "bags.plain"]).unique().tolist()
    assert set(used) == set(Tier)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_they_are_with_other_optimizers(optimizer: str) -> None:
    cases = [Case("row_wise", "row_wise", name) for name in OPTIMIZERS]
    (case,) = (case for case in cases if case.optimizer == optimizer)
    for path in PATHS:
        found = assembled(outcomes(2, 2, *cases)[case], path)
        assert_same(found, whole(optimizer, case.budget).parts()[path], path)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_column_shards_of_a_row_agree_and_do_not_depend_on_the_ranks_that_hold_them(optimizer: str) -> None:
    column, *others = (Case(kind, "table_wise", optimizer, COLUMN_BUDGET) for kind in COLUMN_TYPES)
    single = Case("table_wise", "column_wise", optimizer, COLUMN_BUDGET)
    two, four = outcomes(2, 2, column, single), outcomes(4, 2, *others)
    for path in PATHS:
        wanted = assembled(two[column], path)
        assert wanted.tier.unique().numel() > 2 or path == "bags.plain"
        for case in others:
            assert_same(assembled(four[case], path), wanted, f"{case.kind} {path}")
    assert assembled(two[single], "single.item").tier.unique().numel() > 2
