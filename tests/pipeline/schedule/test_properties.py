"""Whatever can be built is valid, can be executed, and holds as many slices as the paper says."""

from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.pipeline.schedule.execution import execute
from tests.pipeline.schedule.shapes import SPLITS, arguments
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.graph import EXCHANGES
from thresher.pipeline.schedule.ops import Kind
from thresher.pipeline.schedule.validate import validate
from thresher.pipeline.schedule.work import Work

FORCED = (ExchangeRule(forced=True), Work(attention=1.0))
RULES = [(None, Work()), (ExchangeRule(), Work(attention=4.0)), FORCED, (ExchangeRule(limit=2), Work(attention=9.0))]
"""How attention is shared, and how much of it there is."""
ALL_SPLITS = [
    dict(zip(("split_embedding", "split_head", "split_backward"), b, strict=True)) for b in product((0, 1), repeat=3)
]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def peak_live(ops):
    live = peak = 0
    for op in ops:
        live += (op.kind is Kind.FORWARD) - (op.kind in (Kind.BACKWARD, Kind.INPUT_BACKWARD))
        peak = max(peak, live)
    return peak


def check(shape, splits, rule, work):
    """Valid, executable; of SlimPipe also the number of live slices."""
    schedule = build_schedule(*shape, exchange=rule, work=work, **splits)
    validate(schedule)
    execute(schedule)
    p, v, m, n, slack, policy = shape
    if policy == "slimpipe":
        peaks = [peak_live(ops) for ops in schedule.ranks]
        assert peaks == [min(n * v + slack * (p - 1 - r), m * n * v) for r in range(p)]
    if rule is not None and rule.forced and p > 1:
        assert schedule.of(0, *EXCHANGES)


def _size(shape):
    p, v, m, n, *_ = shape
    return p * v * m * n


@QUICK
@given(arguments().filter(lambda shape: _size(shape) <= 700), SPLITS, st.sampled_from(RULES))
def test_what_is_built_is_valid(shape, splits, rule_and_work):
    rule, work = rule_and_work
    check(shape, splits, rule if shape[-1] == "slimpipe" else None, work)


@QUICK
@given(arguments(4).filter(lambda shape: shape[-1] == "slimpipe" and _size(shape) <= 300), SPLITS)
def test_forced_exchanges_are_valid_on_few_ranks(shape, splits):
    check(shape, splits, *FORCED)


@pytest.mark.parametrize("shape", [(8, 5, 1, 32), (7, 2, 3, 25)], ids=str)
def test_large_ones_are_valid(shape):
    check((*shape, 2, "slimpipe"), ALL_SPLITS[-1], *RULES[1])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("chunks", range(1, 6))
@pytest.mark.parametrize("stages", range(1, 9))
def test_all_shapes_are_valid(stages, chunks):
    """Every number of slices and microbatches; slack, splits and exchange take turns so that pairs of them occur."""
    for turn, (m, n) in enumerate(product(range(1, 5), range(stages, 33))):
        slack, splits, rule = 1 + turn % 2, ALL_SPLITS[turn // 2 % 8], RULES[(turn // 2 + stages + chunks) % 4]
        check((stages, chunks, m, n, slack, "slimpipe"), splits, *rule)
