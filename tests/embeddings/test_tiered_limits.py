"""What an update refuses before it changes anything: importance of other samples, and a tier without slots."""

import pytest
import torch
from torch import Tensor

from tests.embeddings.policy.small import BACKEND, SGD, train
from thresher.embeddings.group import StepContext, TableGroup
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.rows import tiered
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import BadBatch, PlanError

ROWS, DIM = 10, 4


def small_table() -> TieredTable:
    return TieredTable("items", "bags.items", ROWS, DIM, seed=3, init_scale=0.1, scalar=False, vectors=0)


def update(table: TieredTable, *ids: int, importance: Tensor | None = None) -> None:
    train([table], [torch.tensor(ids)], [torch.ones(len(ids), DIM)], importance=importance)


@pytest.mark.parametrize("samples", [1, 3])
def test_importance_of_other_samples_is_refused(samples: int) -> None:
    table = small_table()
    with pytest.raises(BadBatch) as told:
        update(table, 4, 7, importance=torch.ones(samples))
    said = f"table 'items': importance is given for {samples} samples, but feature 0 has 2 bags. Give one number"
    assert said in told.value.message
    assert table.step == 0
    assert table.live(Tier.INT8) == 0
    table.decay = 0.5
    update(table, 4, 7, importance=torch.tensor([2.0, 3.0]))
    assert (table.stat[[4, 7], 1] / table.gain).tolist() == [1.0, 1.5]


def test_each_feature_must_have_the_samples() -> None:
    tables = [small_table(), small_table()]
    ids = [torch.tensor([1, 2]), torch.tensor([3])]
    with pytest.raises(BadBatch, match="given for 2 samples, but feature 1 has 1 bags"):
        train(tables, ids, [torch.ones(len(part), DIM) for part in ids], importance=torch.ones(2))


def test_tables_without_priorities_do_not_ask_for_it() -> None:
    table = FlatTable("flat", ROWS, DIM, scalar=False, vectors=0)
    table.weights.zero_()
    group = TableGroup([table], [0], Pooling.SUM, SGD, BACKEND, StepContext(torch.ones(7)))
    group(torch.tensor([4]), torch.arange(2)).sum().backward()
    assert table.weights.count_nonzero() == DIM


def test_a_tier_that_may_run_out_of_slots_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiered, "MAX_SLOTS", 8)
    monkeypatch.setattr(tiered, "SPARE_SLOTS", 3)
    table = small_table()
    update(table, 0, 1, 2, 3, 4)
    update(table, 5)
    with pytest.raises(PlanError) as told:
        update(table, 6)
    assert told.value.message == (
        "PlanError: table 'items': 6 of a shard's 10 rows are in tier int8, a tier holds at most 8. "
        "Cut the table by rows over more ranks"
    )
    assert (table.step, table.live(Tier.INT8)) == (2, 6)


def test_a_tier_with_slots_for_all_rows_may_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiered, "MAX_SLOTS", ROWS)
    table = small_table()
    for row in range(ROWS):
        update(table, row)
    update(table, 0)
    assert table.live(Tier.INT8) == ROWS


def test_too_few_slots_for_the_rows_that_enter_are_refused() -> None:
    with pytest.raises(PlanError, match="a shard of 10 rows needs 10 slots in tier int8"):
        TieredTable("t", "t", ROWS, DIM, seed=3, init_scale=0.1, scalar=False, vectors=0, slots={Tier.INT8: 9})
