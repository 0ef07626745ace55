"""The comparison that other backends go through, applied to the reference itself and to broken copies of it."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.embeddings.backends import Case, TableCase, assert_same, cases
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

ALL_LEVELS = (Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)
CASE = Case(
    seed=1,
    tables=(TableCase(50, 16, ALL_LEVELS), TableCase(20, 16)),
    features=(0, 1, 0),
    batch=(12, 12, 12),
    longest=4,
    pooling=Pooling.MEAN,
    weighted=True,
    important=True,
    int32=False,
    optimizer=TableOptimizer(name="rowwise_adagrad"),
    gradient=1.0,
    steps=3,
    decay=0.01,
    first_threshold=1e-2,
    maintained=True,
)


@settings(max_examples=30)
@given(cases())
def test_running_a_case_twice_gives_the_same_to_the_last_bit(case: Case) -> None:
    assert_same(case, Reference())


@pytest.mark.slow
@settings(max_examples=1000)
@given(cases())
def test_a_thousand_cases_run_twice_give_the_same(case: Case) -> None:
    assert_same(case, Reference())


class LastBit(Reference):
    """Is off by one unit in the last place."""

    def lookup(self, *args: Any) -> Tensor:
        return torch.nextafter(super().lookup(*args), torch.tensor(torch.inf))


class Hasty(Reference):
    """Raises priorities a little too fast."""

    def update(self, tables: Any, found: Any, grad: Tensor, rules: Any, *rest: Any) -> Any:
        rules = [dataclasses.replace(rule, priority_gain=rule.priority_gain * 1.0001) for rule in rules]
        return super().update(tables, found, grad, rules, *rest)


class Leaky(Reference):
    """Loses a slot whenever it compacts."""

    def compact(self, table: TieredTable, tier: Tier) -> None:
        super().compact(table, tier)
        table.count[tier, 0] += 1


@pytest.mark.parametrize("broken", [LastBit, Hasty, Leaky])
def test_the_comparison_sees_a_backend_that_is_off_by_a_little(broken: type[Reference]) -> None:
    with pytest.raises(AssertionError):
        assert_same(CASE, broken())
