"""The Triton backend against the reference: on a GPU, or on the CPU where Triton was imported with its interpreter on.

``tests/embeddings/test_triton_interpreter.py`` starts the second kind.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from torch import Tensor

from tests.embeddings.backends import Case, TableCase, assert_same, assert_same_tables, cases, contents, rules, run_case
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.gpu.backend import TritonBackend
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.tiered import FREE, TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import BadGradient, BadIds, PlanError

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
WHOLE = 1 << 30
"""A piece that no run exceeds."""
LEVELS = (Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)
CASE = Case(
    seed=3,
    tables=(
        TableCase(21, 16, LEVELS, col0=4, scarce=True),
        TableCase(17, 8, LEVELS, Tier.INT4, dynamic=True),
        TableCase(12, 18),
        TableCase(9, 34, LEVELS, Tier.FP16, row0=1020),
    ),
    features=(0, 1, 3, 2, 0),
    batch=(9, 9, 9, 9, 9),
    longest=3,
    pooling=Pooling.MEAN,
    weighted=True,
    important=True,
    int32=False,
    optimizer=TableOptimizer(),
    gradient=1.0,
    steps=2,
    decay=0.01,
    first_threshold=6e-5,
    maintained=True,
    device=DEVICE,
)
PLAIN = replace(CASE, pooling=Pooling.SUM, weighted=False, maintained=False, steps=3, first_threshold=2e-4)
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes masked numbers too
]


@pytest.fixture(scope="module", autouse=True)
def fast_products() -> Any:
    """The interpreter multiplies 64-bit words one by one, in Python."""
    if not INTERPRETED:
        yield
        return
    import triton.runtime.interpreter as interpreter

    def upper(a: Any, b: Any) -> Any:
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        cross = (a & low) * (b & low) >> half
        first = (a >> half) * (b & low) + cross
        second = (a & low) * (b >> half) + (first & low)
        return (a >> half) * (b >> half) + (first >> half) + (second >> half)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "np_umulhi_u64", upper)
        yield


def backend(piece: int = WHOLE, tile: int = 4096) -> TritonBackend:
    """With a large tile: the interpreter's time goes by programs."""
    return TritonBackend(piece, tile)


@pytest.mark.parametrize(
    "case",
    [
        replace(PLAIN, optimizer=TableOptimizer(name="sgd", weight_decay=0.1)),
        replace(CASE, optimizer=TableOptimizer(name="rowwise_adagrad", weight_decay=0.1, decay="decoupled")),
        replace(PLAIN, optimizer=TableOptimizer(name="adagrad"), important=False, first_threshold=6e-4),
        replace(CASE, optimizer=TableOptimizer(name="adam")),
        replace(PLAIN, optimizer=TableOptimizer(name="rowwise_adam", weight_decay=0.1), pooling=Pooling.MEAN),
        replace(PLAIN, optimizer=TableOptimizer(name="ftrl", l1=0.01, l2=0.1), seed=5),
    ],
    ids=lambda case: case.optimizer.name,
)
def test_every_optimizer_on_every_tier_is_the_reference_to_the_last_bit(case: Case) -> None:
    tile = 512 if case.optimizer.name == "adagrad" else 4096  # programs of 8 rows, or of 64
    assert_same(case, backend(tile=tile))


@pytest.mark.parametrize("case", [CASE, PLAIN], ids=["maintained", "plain"])
def test_the_steps_reach_every_tier_and_run_out_of_slots(case: Case) -> None:
    tables, seen = run_case(replace(case, device="cpu"), Reference())
    reached = {tier for table in tables if isinstance(table, TieredTable) for tier in table.tier_of().tolist()}
    assert reached >= set(Tier) - {Tier.DROPPED}
    stats = [step[-1] for step in (seen[::2] if case.maintained else seen)]
    assert sum(each.promoted for each in stats) > 0
    assert sum(each.refused for each in stats) > 0 or case is PLAIN


def test_slots_that_rows_left_are_given_again() -> None:
    case = replace(PLAIN, tables=(TableCase(60, 8, LEVELS),), features=(0,), batch=(12,), steps=6)
    assert_same(case, backend())
    (table,), seen = run_case(replace(case, device="cpu"), Reference())
    left = sum(step[-1].promoted for step in seen)
    assert left > int(table.count[Tier.INT8, FREE]) + 1, "some were taken again"


@settings(max_examples=3)
@given(cases(DEVICE))
def test_drawn_cases_are_the_reference_to_the_last_bit(case: Case) -> None:
    assert_same(case, backend())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=300)
@given(cases(DEVICE))
def test_many_drawn_cases_are_the_reference_to_the_last_bit(case: Case) -> None:
    assert_same(case, backend())


LONG = replace(
    CASE, tables=(TableCase(40, 16, LEVELS),), features=(0, 0), batch=(30, 30), longest=7, maintained=False, steps=1
)


def test_long_runs_are_summed_in_pieces_close_to_the_reference_and_short_ones_are_exact() -> None:
    ours, _ = run_case(LONG, backend(piece=4))
    theirs, _ = run_case(replace(LONG, device="cpu"), Reference())
    occurrences = torch.bincount(LONG.bags(torch.Generator().manual_seed(LONG.seed)).ids.cpu(), minlength=40)
    short = occurrences <= 4
    assert int((occurrences > 12).sum()) > 0
    assert int((short & (occurrences > 0)).sum()) > 0
    for mine, other in zip(contents(ours[0]), contents(theirs[0]), strict=True):
        assert torch.equal(mine.cpu()[short], other[short])
        assert torch.allclose(mine.cpu()[~short].float(), other[~short].float(), rtol=1e-4, atol=1e-3)


def test_pieces_do_not_depend_on_tiles() -> None:
    first, _ = run_case(LONG, backend(piece=4))
    second, _ = run_case(LONG, backend(piece=4, tile=128))
    assert_same_tables(first[0], second[0])


def test_no_piece_is_lost_or_counted_twice() -> None:
    """Whole numbers have one sum, in whatever pieces."""
    table = TableCase(3, 4).build(0, TableOptimizer(name="sgd"), DEVICE)
    table.weights.zero_()
    ids = torch.tensor([1] * 37 + [2] * 5, device=DEVICE)
    bags = Bags(ids, torch.arange(43, device=DEVICE), None, (0,), (42,), Pooling.SUM)
    grad = torch.arange(42.0, device=DEVICE).unsqueeze(1).repeat(1, 4)
    ours = backend(piece=4)
    ours.update([table], ours.sort([table], bags), grad, [TableOptimizer(name="sgd").rule(1.0, 1)])
    assert table.weights[:, 0].tolist() == [0, -sum(range(37)), -sum(range(37, 42))]


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        ([0, 40, 1], [0, 1, 3]),
        ([0, -1, 1], [0, 1, 3]),
        ([0, 1, 2], [0, 4, 3]),
        ([0, 1, 2], [1, 2, 3]),
        ([0, 1, 2], [0, 1, 2]),
    ],
)
def test_bad_ids_and_offsets_are_refused_in_the_words_of_the_reference(ids: list[int], offsets: list[int]) -> None:
    tables = LONG.build()
    bags = Bags(torch.tensor(ids, device=DEVICE), torch.tensor(offsets, device=DEVICE), None, (0,), (2,), Pooling.SUM)
    with pytest.raises(BadIds) as theirs:
        Reference().lookup(tables, bags)
    for act in (backend().lookup, backend().sort):
        with pytest.raises(BadIds) as ours:
            act(tables, bags)
        assert str(ours.value) == str(theirs.value)


def test_ids_without_bags_are_refused() -> None:
    bags = Bags(torch.tensor([1], device=DEVICE), torch.tensor([0], device=DEVICE), None, (0,), (0,), Pooling.SUM)
    with pytest.raises(BadIds, match="there are 1 ids"):
        backend().sort(LONG.build(), bags)


def update(tables: list[Any], grad_of: Any) -> Any:
    """One update of the rows 3, 5, 5, 7 of the table."""
    bags = Bags(
        torch.tensor([5, 3, 5, 7], device=DEVICE), torch.arange(5, device=DEVICE), None, (0,), (4,), Pooling.SUM
    )
    grad: Tensor = torch.ones(4, 16)
    grad_of(grad)
    ours = backend()
    tables[0].advance()
    return ours.update(tables, ours.sort(tables, bags), grad.to(DEVICE), rules(LONG, tables))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_refused_and_its_row_left_alone(value: float) -> None:
    tables = LONG.build()
    before = backend().read(tables[0], torch.tensor([5], device=DEVICE))

    def spoil(grad: Tensor) -> None:
        grad[2, 15] = value

    with pytest.raises(BadGradient, match="row 5 is not finite"):
        update(tables, spoil)
    assert torch.equal(backend().read(tables[0], torch.tensor([5], device=DEVICE)), before)
    assert tables[0].tier_of()[5] == Tier.NONE
    assert sum(tables[0].live(tier) for tier in tables[0].stored_levels) == 2


def test_writing_into_a_full_tier_is_refused() -> None:
    table = TableCase(8, 4, LEVELS, scarce=True).build(0, TableOptimizer(name="sgd"), DEVICE)
    rows = torch.arange(8, device=DEVICE)
    with pytest.raises(PlanError, match="are free"):
        backend().write(table, rows, torch.ones(8, 4, device=DEVICE), torch.full_like(rows, int(Tier.FP32)))
