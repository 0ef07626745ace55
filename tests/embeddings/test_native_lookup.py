"""The compiled lookup: equal to the reference to the bit, on every instruction set and number of threads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.embeddings.backends import Case, cases, ours_like, run_case
from thresher.embeddings.kernels.backend import Sorted, Table
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.native.backend import Native
from thresher.embeddings.kernels.native.library import Library
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.errors import BadIds


class Compared(Reference):
    """The reference, which meanwhile looks everything up with the compiled code too."""

    def __init__(self, native: Native) -> None:
        self._native = native

    def sort(self, tables: Sequence[Table], bags: Bags) -> Sorted:
        found, ours = super().sort(tables, bags), self._native.sort(tables, bags)
        for mine, other in zip(ours.unique, found.unique, strict=True):
            assert ours_like(mine, other)
        assert_places(ours, found, len(tables))
        assert ours_like(self._native.lookup(tables, bags, ours), super().lookup(tables, bags))
        return found

    def lookup(self, tables: Sequence[Table], bags: Bags, checked: Sorted | None = None) -> Tensor:
        output = super().lookup(tables, bags)
        assert ours_like(self._native.lookup(tables, bags), output)
        return output

    def weight_gradient(self, tables: Sequence[Table], bags: Bags, grad: Tensor) -> Tensor:
        result = super().weight_gradient(tables, bags, grad)
        assert ours_like(self._native.weight_gradient(tables, bags, grad), result)
        return result

    def read(self, table: Table, rows: Tensor) -> Tensor:
        values = super().read(table, rows)
        assert ours_like(self._native.read(table, rows), values)
        return values


def assert_places(ours: Sorted, found: Sorted, tables: int) -> None:
    """Each distinct row occurs where the ids say, in ascending order."""
    bags, handle = ours.bags, ours.handle
    of_position = torch.repeat_interleave(torch.arange(len(bags.offsets) - 1), bags.offsets.diff())
    for table in range(tables):
        features = [f for f, number in enumerate(bags.tables) if number == table]
        bounds = [(bags.offsets[bags.first_bags[f]], bags.offsets[bags.first_bags[f + 1]]) for f in features]
        positions = torch.cat([torch.arange(0), *[torch.arange(*pair) for pair in bounds]])
        for row, payload in zip(ours.unique[table].tolist(), handle.places(table), strict=True):
            expected = positions[bags.ids[positions] == row]
            by_bag = bags.pooling is not Pooling.NONE and bags.weights is None
            assert payload.tolist() == (of_position[expected] if by_bag else expected).tolist()


@pytest.fixture(scope="module")
def library() -> Library:
    return Library()


@pytest.fixture(params=[(2, 1), (2, 2), (1, 1), (0, 1), (0, 2)], ids=lambda pair: f"isa{pair[0]}-threads{pair[1]}")
def native(request, library) -> Iterator[Native]:
    level, threads = request.param
    before = torch.get_num_threads()
    if library.set_isa(level) != level:
        library.set_isa(2)
        pytest.skip("this processor has no such instructions")
    torch.set_num_threads(threads)
    yield Native(library)
    torch.set_num_threads(before)
    library.set_isa(2)


@pytest.mark.parametrize("examples", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_lookups_are_the_references(native: Native, examples: int) -> None:
    @given(case=cases())
    @settings(max_examples=examples, deadline=None)
    def check(case: Case) -> None:
        run_case(case, Compared(native))

    check()


WIDTHS = (1, 2, 3, 4, 6, 8, 10, 16, 17, 18, 32, 48, 62, 64, 100, 128, 144, 256, 300, 1024)


@pytest.mark.parametrize("pooling", list(Pooling))
def test_flat_tables_of_any_width(native: Native, pooling: Pooling) -> None:
    for dim in WIDTHS:
        table = FlatTable("t", 50, dim, scalar=False, vectors=0)
        table.weights.normal_()
        bags = drawn([table], pooling, batch=7, length=5)
        assert ours_like(native.lookup([table], bags), Reference().lookup([table], bags)), dim


@pytest.mark.parametrize("rows", [1, 2, 2048, 2049, 100_000, 5_000_000, (1 << 32) + 5])
def test_sorting_of_many_ids(native: Native, rows: int) -> None:
    """More ids than are sorted by comparing, over one to four digits, over rows beyond 32 bits."""
    table = TieredTable("t", "t", rows, 2, seed=1, init_scale=0.1, scalar=False, vectors=0)
    bags = drawn([table], Pooling.SUM, batch=100, length=30)
    Compared(native).sort([table], bags)


def drawn(tables: list[Table], pooling: Pooling, batch: int, length: int) -> Bags:
    """A lookup of one feature a table, two thirds of the ids within the first rows of it."""
    n = batch * length
    torch.manual_seed(batch + length)
    ids = [torch.randint(0, table.rows, (n,)) for table in tables]
    some = [torch.where(torch.rand(n) < 0.67, each % 97, each) for each in ids]
    offsets = torch.arange(0, n * len(tables) + 1, length)
    return Bags(torch.cat(some), offsets, None, tuple(range(len(tables))), (batch,) * len(tables), pooling)


def test_many_bags_are_cut_into_blocks_and_threads(native: Native) -> None:
    tables = [FlatTable(f"t{dim}", 500, dim, scalar=False, vectors=0) for dim in (16, 128, 64)]
    for table in tables:
        table.weights.normal_()
    bags = drawn(tables, Pooling.MEAN, batch=3000, length=2)
    assert ours_like(native.lookup(tables, bags), Reference().lookup(tables, bags))
    ragged = replace(bags, batch=(8000, 10, 990))
    assert ours_like(native.lookup(tables, ragged), Reference().lookup(tables, ragged))


BAD = {
    "id below": ([0, 5, -1, 3], [0, 2, 4]),
    "id above": ([0, 5, 10, 3], [0, 2, 4]),
    "id far above": ([0, 5, 1 << 40, 3], [0, 2, 4]),
    "first offset": ([0, 5, 1, 3], [1, 2, 4]),
    "falling offset": ([0, 5, 1, 3], [0, 5, 4]),
    "last offset": ([0, 5, 1, 3], [0, 2, 3]),
    "too many offsets": ([0, 5, 1, 3], [0, 2, 3, 4]),
}


@pytest.mark.parametrize("kind", BAD)
def test_faults_are_told_as_the_reference_tells_them(native: Native, kind: str) -> None:
    ids, offsets = BAD[kind]
    table = FlatTable("clicks", 10, 4, scalar=False, vectors=0)
    bags = Bags(torch.tensor(ids), torch.tensor(offsets), None, (0,), (2,), Pooling.SUM)
    with pytest.raises(BadIds) as expected:
        Reference().sort([table], bags)
    for attempt in (native.sort, native.lookup):
        with pytest.raises(BadIds) as raised:
            attempt([table], bags)
        assert str(raised.value) == str(expected.value)


def test_more_ids_than_can_be_numbered_are_refused(native: Native) -> None:
    table = FlatTable("clicks", 10, 4, scalar=False, vectors=0)
    ids = torch.zeros(1, dtype=torch.int64).expand(1 << 32)
    bags = Bags(ids, torch.tensor([0, 1 << 32]), None, (0,), (1,), Pooling.SUM)
    with pytest.raises(BadIds, match="4294967296 ids in one lookup"):
        native.sort([table], bags)
