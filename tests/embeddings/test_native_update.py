"""The compiled updates do what the reference does, to the last bit, on every instruction set and number of threads."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.embeddings.backends import OPTIMIZERS, Case, TableCase, assert_same, assert_same_tables, cases
from thresher.embeddings.kernels.backend import Backend
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.native.backend import Native
from thresher.embeddings.kernels.native.library import Library, load
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.kernels.rules import UpdateRule
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import BadGradient, PlanError

AVX512, AVX2, SCALAR = 2, 1, 0
ALL_LEVELS = (Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)
SGD = UpdateRule("sgd", lr=0.5)


@pytest.fixture(scope="module")
def library() -> Library:
    found = load()
    assert found is not None, "build the kernels: make setup"
    return found


@pytest.fixture(autouse=True)
def as_before(library: Library) -> Iterator[None]:
    level, threads = library.isa, torch.get_num_threads()
    yield
    library.set_isa(level)
    torch.set_num_threads(threads)


def check(case: Case, library: Library, level: int, threads: int) -> None:
    library.set_isa(level)
    torch.set_num_threads(threads)
    assert_same(case, Native(library))


@pytest.mark.parametrize("level", [AVX512, AVX2, SCALAR])
def test_equals_the_reference(library: Library, level: int) -> None:
    @settings(deadline=None, max_examples=40)
    @given(cases(), st.integers(1, 3))
    def run(case: Case, threads: int) -> None:
        check(case, library, level, threads)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("level", [AVX512, AVX2, SCALAR])
def test_equals_the_reference_in_a_thousand_cases(library: Library, level: int) -> None:
    @settings(deadline=None, max_examples=1000)
    @given(cases(), st.integers(1, 3))
    def run(case: Case, threads: int) -> None:
        check(case, library, level, threads)

    run()


def wide_case(optimizer: str, pooling: Pooling, dims: tuple[int, int]) -> Case:
    """Bags of up to 20 ids over few rows: long runs, repeated ids within a bag, a table of two features."""
    return Case(
        seed=3,
        tables=(TableCase(60, dims[0], ALL_LEVELS, entry=Tier.INT4), TableCase(20, dims[1], col0=4)),
        features=(0, 1, 0),
        batch=(9, 9, 9),
        longest=20,
        pooling=pooling,
        weighted=pooling is Pooling.MEAN,
        important=True,
        int32=True,
        optimizer=TableOptimizer.model_validate({"name": optimizer, "weight_decay": 0.1}),
        gradient=0.1,
        steps=2,
        decay=0.01,
        first_threshold=1e-2,
        maintained=True,
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_wide_rows_equal_the_reference(library: Library, optimizer: str) -> None:
    check(wide_case(optimizer, Pooling.SUM, (256, 300)), library, library.isa, 2)
    check(wide_case(optimizer, Pooling.MEAN, (512, 16)), library, library.isa, 2)


@pytest.mark.parametrize("importance", [False, True])
def test_unpooled_rows_equal_the_reference(library: Library, importance: bool) -> None:
    case = replace(wide_case("adam", Pooling.NONE, (64, 64)), important=importance)
    for level in (AVX512, AVX2, SCALAR):
        check(case, library, level, 3)


def one_bag(ids: list[int], pooling: Pooling = Pooling.SUM) -> Bags:
    return Bags(torch.tensor(ids), torch.tensor([0, len(ids)]), None, (0,), (1,), pooling)


def tiered(slots: dict[Tier, int], rows: int = 8, levels: tuple[Tier, ...] = ALL_LEVELS) -> TieredTable:
    return TieredTable(
        "items",
        "bags.items",
        rows,
        16,
        seed=1,
        init_scale=0.1,
        scalar=False,
        vectors=0,
        levels=levels,
        slots=slots,
    )


def both(library: Library) -> list[Backend]:
    return [Native(library), Reference()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_gradient_that_is_not_finite_stops_the_update(library: Library, value: float, threads: int) -> None:
    torch.set_num_threads(threads)
    for level in (AVX512, AVX2, SCALAR):
        library.set_isa(level)
        for table in (FlatTable("items", 2000, 18, scalar=False, vectors=0), tiered({}, 2000)):
            backend = Native(library)
            ids = torch.arange(1000)
            bags = Bags(ids, torch.arange(1001), None, (0,), (1000,), Pooling.SUM)
            grad = torch.ones(1000, table.dim)
            grad[417, table.dim - 1], grad[903, 0] = value, value
            with pytest.raises(BadGradient, match="table 'items': the gradient of row 417 is not finite"):
                backend.update([table], backend.sort([table], bags), grad, [SGD])


def test_sums_that_overflow_are_not_finite(library: Library) -> None:
    table = FlatTable("items", 4, 4, scalar=False, vectors=0)
    backend = Native(library)
    found = backend.sort([table], one_bag([2, 2]))
    with pytest.raises(BadGradient, match="row 2"):
        backend.update([table], found, torch.full((1, 4), 3e38), [SGD])


def test_rows_that_find_no_slot_stay_and_are_counted(library: Library) -> None:
    rule = replace(SGD, priority_gain=1.0, promote_above=(0.0, 0.0, 0.0, 0.0, 0.5, 1.5))
    for backend in both(library):
        table = tiered({Tier.FP16: 2, Tier.FP32: 0})
        table.advance()
        first = backend.update([table], backend.sort([table], one_bag([5, 1, 3])), torch.ones(1, 16), [rule])
        assert (first.rows, first.promoted, first.refused) == (3, 0, 1)
        assert table.tier_of().tolist() == [0, Tier.FP16, 0, Tier.FP16, 0, Tier.INT8, 0, 0]
        table.advance()
        second = backend.update([table], backend.sort([table], one_bag([3, 5])), torch.ones(1, 16), [rule])
        assert (second.rows, second.promoted, second.refused) == (2, 0, 2)


def test_promotions_are_counted_without_first_updates(library: Library) -> None:
    rule = replace(SGD, priority_gain=1.0, promote_above=(0.0, 0.0, 0.0, 0.0, 1.5, 2.5))
    backend, table = Native(library), tiered({})
    counts = []
    for _ in range(3):
        table.advance()
        counts.append(
            backend.update([table], backend.sort([table], one_bag([0, 7])), torch.ones(1, 16), [rule]).promoted
        )
    assert counts == [0, 2, 2]
    assert table.tier_of().tolist() == [Tier.FP32, 0, 0, 0, 0, 0, 0, Tier.FP32]


def test_what_is_written_beyond_the_slots_is_refused_whole(library: Library) -> None:
    for backend in both(library):
        table = tiered({Tier.FP32: 2})
        backend.write(table, torch.tensor([4]), torch.ones(1, 16), torch.tensor([Tier.FP32]))
        with pytest.raises(PlanError, match=r"table .items.: 2 rows need a slot in tier fp32, 1 are free"):
            backend.write(table, torch.tensor([0, 1]), torch.ones(2, 16), torch.tensor([Tier.FP32] * 2))
        assert table.tier_of().tolist() == [0, 0, 0, 0, Tier.FP32, 0, 0, 0]


def test_a_slot_given_up_in_a_write_can_be_taken_in_it(library: Library) -> None:
    for backend in both(library):
        table = tiered({Tier.FP32: 1})
        backend.write(table, torch.tensor([4]), torch.ones(1, 16), torch.tensor([Tier.FP32]))
        backend.write(table, torch.tensor([0, 4]), torch.ones(2, 16), torch.tensor([Tier.FP32, Tier.INT8]))
        assert table.tier_of()[[0, 4]].tolist() == [Tier.FP32, Tier.INT8]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_instructions_do_not_matter_for_many_rows(library: Library, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(6000, generator=generator) ** 4 * 5000).long()
    bags = Bags(torch.cat([ids, ids.flip(0)]), torch.arange(0, 12001, 10), None, (0, 1), (600, 600), Pooling.SUM)
    grad = torch.randn(600, 96, generator=generator)
    rule = UpdateRule("rowwise_adagrad", lr=0.1, priority_gain=1.0, promote_above=(0.0,) * 4 + (2.0, 4.0))
    results = []
    for level in (AVX512, AVX2, SCALAR):
        library.set_isa(level)
        backend = Native(library)
        flat = FlatTable("flat", 5000, 64, scalar=True, vectors=0)
        mixed = TieredTable("t", "t", 5000, 32, seed=0, init_scale=0.1, scalar=True, vectors=0)
        for _ in range(3):
            mixed.advance()
            backend.update([flat, mixed], backend.sort([flat, mixed], bags), grad, [rule, rule])
        results.append((flat, mixed))
    for flat, mixed in results[1:]:
        assert_same_tables(flat, results[0][0])
        assert_same_tables(mixed, results[0][1])


def test_a_gradient_of_another_shape_is_our_own_bug(library: Library) -> None:
    table = FlatTable("items", 4, 4, scalar=False, vectors=0)
    backend = Native(library)
    found = backend.sort([table], one_bag([2, 2]))
    with pytest.raises(AssertionError):
        backend.update([table], found, torch.ones(1, 8), [SGD])
    with pytest.raises(AssertionError):
        backend.update([table], found, torch.ones(1, 4, dtype=torch.float64), [SGD])
