"""What is no lookup stops with an error that names the fault."""

import pytest
import torch

from thresher.embeddings.group import TableGroup
from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import BadGradient, BadIds, PlanError


def flat(rows: int = 10, name: str = "users") -> FlatTable:
    return FlatTable(name, rows, 4, scalar=True, vectors=0)


def tiered(rows: int = 10, *, dynamic: bool = False, slots: dict[Tier, int] | None = None) -> TieredTable:
    identity = torch.arange(rows) + 1000 if dynamic else None
    return TieredTable(
        "raw", "raw", rows, 4, seed=0, init_scale=0.1, scalar=True, vectors=0, identity=identity, slots=slots
    )


def look_up(
    ids: torch.Tensor | list[int],
    offsets: torch.Tensor | list[int],
    weights: torch.Tensor | None = None,
    batch: tuple[int, ...] = (1, 2),
    tables: list[Table] | None = None,
) -> str:
    """The message of the error, the same from both calls that check."""
    tables = tables or [flat(), flat(20, "items")]
    ids = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids, dtype=torch.int64)
    offsets = offsets if isinstance(offsets, torch.Tensor) else torch.tensor(offsets)
    bags = Bags(ids, offsets, weights, tuple(range(len(batch))), tuple(batch), Pooling.SUM)
    backend = Reference()
    with pytest.raises(BadIds) as sorted_error:
        backend.sort(tables, bags)
    with pytest.raises(BadIds) as error:
        backend.lookup(tables, bags)
    assert str(error.value) == str(sorted_error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_ids_outside_their_table(kind: torch.dtype) -> None:
    ids = torch.tensor([9, 19, 20], dtype=kind)
    assert look_up(ids, [0, 1, 2, 3]).startswith(
        "BadIds: feature 1 of table 'items': id 20 at position 2 is outside 0..19. Map ids to rows"
    )
    ids = torch.tensor([-3, 19, 20], dtype=kind)
    assert "feature 0 of table 'users': id -3 at position 0 is outside 0..9" in look_up(ids, [0, 1, 2, 3])


def test_the_first_fault_is_named() -> None:
    message = look_up([1, 50, 10, -1], [0, 3, 3, 4])
    assert "id 50 at position 1" in message


def test_ids_beyond_32_bits_are_not_cut() -> None:
    assert f"id {2**32 + 3} at position 0 is outside 0..9" in look_up([2**32 + 3], [0, 1, 1, 1])


def test_an_id_without_a_row_is_for_dynamic_tables() -> None:
    table = tiered(dynamic=True)
    bags = Bags(torch.tensor([-1, 3]), torch.tensor([0, 1, 2]), None, (0,), (2,), Pooling.SUM)
    backend = Reference()
    assert not backend.lookup([table], bags)[0].any()
    assert backend.sort([table], bags).unique[0].tolist() == [3]
    assert "id -2 at position 0 is outside -1..9" in look_up([-2], [0, 1], batch=(1,), tables=[table])
    assert "id -1 at position 0 is outside 0..9" in look_up([-1], [0, 1], batch=(1,), tables=[tiered()])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 1, 2], "3 offsets came with 3 bags. Give 4 offsets"),
        ([1, 1, 2, 3], "the first offset is 1. Start with 0"),
        ([0, 3, 2, 3], "feature 1 of table 'items': offset 2 of bag 2 follows offset 3 of bag 1"),
        ([0, -1, 2, 3], "feature 0 of table 'users': offset -1 of bag 1 follows offset 0 of bag 0"),
        ([0, 1, 2, 2], "the last offset is 2, there are 3 ids. End with the number of ids"),
        ([0, 1, 2, 4], "the last offset is 4, there are 3 ids"),
    ],
)
def test_offsets_out_of_order(offsets: list[int], message: str) -> None:
    assert message in look_up([1, 2, 3], offsets)


def test_types_and_lengths_that_do_not_fit() -> None:
    assert "ids are a 1-dimensional tensor of float32. Give one dimension of int32 or int64" in look_up(
        torch.tensor([1.0, 2.0, 3.0]), [0, 1, 2, 3]
    )
    assert "ids are a 2-dimensional tensor of int64" in look_up(torch.tensor([[1, 2, 3]]), [0, 1, 2, 3])
    assert "offsets are a 1-dimensional tensor of int32" in look_up([1, 2, 3], torch.tensor([0, 1, 2, 3]).int())
    weights = torch.ones(2)
    assert "2 weights of float32 came with 3 ids" in look_up([1, 2, 3], [0, 1, 2, 3], weights)
    assert "3 weights of float64 came with 3 ids" in look_up([1, 2, 3], [0, 1, 2, 3], torch.ones(3).double())
    assert "2 features have 3 batch sizes" in str(_with_batch((1, 2, 0)))


def _with_batch(batch: tuple[int, ...]) -> BadIds:
    with pytest.raises(BadIds) as error:
        Reference().lookup(
            [flat()] * 2, Bags(torch.tensor([1]), torch.tensor([0, 1]), None, (0, 1), batch, Pooling.SUM)
        )
    return error.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("table", [flat(), tiered()], ids=["flat", "tiers"])
def test_a_gradient_that_is_not_finite_names_table_and_row_and_changes_nothing(
    table: FlatTable | TieredTable, value: float
) -> None:
    backend = Reference()
    group = TableGroup([table], [0], Pooling.SUM, TableOptimizer(), backend)
    before = backend.read(table, torch.arange(10))
    output = group(torch.tensor([8, 2, 7]), torch.tensor([0, 2, 3]))
    gradient = torch.zeros_like(output)
    gradient[1, 3] = value
    with pytest.raises(BadGradient, match=rf"table '{table.name}': the gradient of row 7 is not finite"):
        output.backward(gradient)
    assert torch.equal(backend.read(table, torch.arange(10)), before)


def test_rows_written_into_a_full_tier_are_refused() -> None:
    table = tiered(slots={Tier.FP32: 2})
    backend, rows = Reference(), torch.arange(3)
    with pytest.raises(PlanError, match="3 rows need a slot in tier fp32, 2 are free"):
        backend.write(table, rows, torch.ones(3, 4), torch.full((3,), int(Tier.FP32)))
    backend.write(table, rows[:2], torch.ones(2, 4), torch.full((2,), int(Tier.FP32)))
