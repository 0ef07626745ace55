"""Tables with tiers through a checkpoint, cut in other ways than when they were saved: one process, many shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.multi.harness import run_ranks
from tests.sharding.tier_tables import PATH, Rectangle, mixed, same, step, table
from thresher.embeddings.init import initial_rows
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import CheckpointError
from thresher.sharding.tier_blocks import BLOCK_ROWS
from thresher.sharding.tier_state import ModelState, TableShape
from thresher.trainer.checkpoint import CheckpointStore, verify
from thresher.trainer.checkpoint.manifest import read_manifest

ROWS, DIM = 90, 16
WHOLE: list[Rectangle] = [(0, ROWS, 0, DIM)]
BY_ROWS: list[Rectangle] = [(0, 45, 0, DIM), (45, 45, 0, DIM)]
OTHER_ROWS: list[Rectangle] = [(0, 31, 0, DIM), (31, 31, 0, DIM), (62, 28, 0, DIM)]
BY_COLUMNS: list[Rectangle] = [(0, ROWS, 0, 8), (0, ROWS, 8, 8)]
OTHER_COLUMNS: list[Rectangle] = [(0, ROWS, 0, 4), (0, ROWS, 4, 12)]
GRID: list[Rectangle] = [(0, 45, 0, 8), (45, 45, 0, 8), (0, 45, 8, 8), (45, 45, 8, 8)]
ADAM = TableOptimizer(name="rowwise_adam")


def state(tables: Sequence[TieredTable], separate: bool = False, rows: int = ROWS, dense: float = 0.0) -> ModelState:
    """A model of one dense layer and a table with tiers."""
    dense_part = nn.Linear(3, 2)
    nn.init.constant_(dense_part.weight, dense)
    columns = tuple(sorted({(part.col0, part.dim) for part in tables}))
    return ModelState(dense_part, tables, {PATH: TableShape("item.weight", rows, DIM, columns, separate, True)})


def shards(places: list[Rectangle], optimizer: TableOptimizer = ADAM, seed: int = 3) -> list[TieredTable]:
    return [table(place, DIM, optimizer, seed) for place in places]


def trained(places: list[Rectangle], optimizer: TableOptimizer = ADAM) -> list[TieredTable]:
    tables = shards(places, optimizer)
    mixed(tables, optimizer)
    return tables


def through(folder: Path, before: Sequence[TieredTable], after: Sequence[TieredTable]) -> None:
    store = CheckpointStore(folder, 1)
    store.save(1, {"model": state(before, dense=2.5)}, {"x": 1})
    target = state(after)
    restored = store.restore({"model": target})
    assert restored is not None
    assert restored.facts["x"] == 1
    assert torch.equal(target.state_dict()["weight"], torch.full((2, 3), 2.5))


def values(tables: Sequence[TieredTable]) -> Tensor:
    whole = torch.full((ROWS, DIM), torch.nan)
    for part in tables:
        found = Reference().read(part, torch.arange(part.rows))
        whole[part.row0 : part.row0 + part.rows, part.col0 : part.col0 + part.dim] = found
    return whole


EXACT = [
    (WHOLE, WHOLE),
    (WHOLE, BY_ROWS),
    (BY_ROWS, WHOLE),
    (BY_ROWS, OTHER_ROWS),
    (OTHER_ROWS, BY_ROWS),
    (BY_COLUMNS, BY_COLUMNS),
    (GRID, BY_COLUMNS),
    (BY_COLUMNS, GRID),
]


@pytest.mark.parametrize(("places", "others"), EXACT, ids=str)
def test_other_rows_and_the_same_columns_are_exact_and_go_on_alike(
    tmp_path: Path, places: list[Rectangle], others: list[Rectangle]
) -> None:
    before, expected, after = trained(places), trained(others), shards(others)
    step(after, ADAM, torch.arange(50), torch.randn(50, DIM))  # loading forgets what was there
    through(tmp_path, before, after)
    for one, two in zip(expected, after, strict=True):
        assert same(one, two)
        assert (one.step, one.gain, one.promote_above, one.keep_from) == (
            two.step,
            two.gain,
            two.promote_above,
            two.keep_from,
        )
    ids, grad = torch.arange(0, ROWS, 2), torch.randn(ROWS // 2, DIM)
    for tables in (expected, after):
        step(tables, ADAM, ids, grad)
    assert all(same(one, two) for one, two in zip(expected, after, strict=True))


@pytest.mark.parametrize("others", [BY_COLUMNS, OTHER_COLUMNS, GRID], ids=str)
def test_a_table_cut_by_columns_reads_as_before(tmp_path: Path, others: list[Rectangle]) -> None:
    before, after = trained(WHOLE), shards(others)
    through(tmp_path, before, after)
    assert torch.equal(values(before), values(after))


@pytest.mark.parametrize(("places", "others"), [(BY_COLUMNS, WHOLE), (GRID, OTHER_ROWS), (BY_COLUMNS, OTHER_COLUMNS)])
def test_joined_columns_of_quantised_rows_move_by_half_a_step_at_most(
    tmp_path: Path, places: list[Rectangle], others: list[Rectangle]
) -> None:
    before, after = trained(places), shards(others)
    through(tmp_path, before, after)
    scale = torch.zeros(ROWS)
    for part in before:
        tier = part.tier_of()
        quantised = (tier == Tier.INT8) | (tier == Tier.INT4)
        found = torch.where(quantised, part.desc[:, 1].contiguous().view(torch.float32), 0.0)
        here = slice(part.row0, part.row0 + part.rows)
        scale[here] = torch.maximum(scale[here], found)
    error = (values(before) - values(after)).abs().amax(1)
    assert bool((error <= 0.5001 * scale).all())
    assert error.any()


def test_scalars_of_whole_rows_load_into_any_split_and_those_kept_apart_do_not(tmp_path: Path) -> None:
    before = trained(BY_COLUMNS)
    store = CheckpointStore(tmp_path, 1)
    store.save(1, {"model": state(before, separate=True)}, {})
    store.restore({"model": state(shards(BY_COLUMNS), separate=True)})
    untouched = shards(WHOLE)
    with pytest.raises(CheckpointError, match=r"saved for columns 0..7, 8..15, this plan has 0..15. Keep the table's"):
        store.restore({"model": state(untouched)})
    assert not untouched[0].desc.any()
    through(tmp_path / "exact", before, untouched)
    stat = untouched[0].stat[:, 0]
    assert torch.equal(stat, before[0].stat[:, 0])
    assert stat.any()


def facts_changed(folder: Path, places: list[Rectangle]) -> CheckpointStore:
    store = CheckpointStore(folder, 1)
    store.save(1, {"model": state(trained(places))}, {})
    return store


MISFITS = [
    (lambda: state(shards(WHOLE, seed=4)), r"saved with seed 3, this run has 4. Keep the tiers, the table optimizer"),
    (lambda: state(shards(WHOLE, TableOptimizer(name="adam"))), r"saved with a scalar a row: True, this run has False"),
    (lambda: state(shards(WHOLE, TableOptimizer())), r"vectors of optimizer state: 1, this run has 0"),
    (lambda: state(shards(WHOLE), rows=91), r"table 'bags.item' is \[90, 16\], the model wants \[91, 16\]"),
]


@pytest.mark.parametrize(("other", "message"), MISFITS, ids=[message[:20] for _, message in MISFITS])
def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path, other: Any, message: str) -> None:
    store = facts_changed(tmp_path, WHOLE)
    target: ModelState = other()
    with pytest.raises(CheckpointError, match=message):
        store.restore({"model": target})
    assert target.state_dict().keys() == {"weight", "bias"}


def test_a_model_without_the_table_is_refused(tmp_path: Path) -> None:
    store = facts_changed(tmp_path, WHOLE)
    with pytest.raises(CheckpointError, match=r"holds 'model.tiers.bags.item:r0\+90:c0\+16', which this run does not"):
        store.restore({"model": nn.Linear(3, 2)})


class Flat(nn.Module):
    """The same model without tiers."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 2)
        self.item = nn.Parameter(torch.full((ROWS, DIM), torch.nan))


def flat_state(model: Flat) -> ModelState:
    return ModelState(model, [], {PATH: TableShape("item", ROWS, DIM, ((0, DIM),), False, False)})


class Tiered(nn.Module):
    """The same model with tiers: its table is none of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 2)


def tiered_state(tables: list[TieredTable]) -> ModelState:
    columns = tuple(sorted({(part.col0, part.dim) for part in tables}))
    return ModelState(Tiered(), tables, {PATH: TableShape("item", ROWS, DIM, columns, False, True)})


@pytest.mark.parametrize("places", [WHOLE, GRID], ids=["whole", "grid"])
def test_a_table_with_tiers_is_decoded_into_a_flat_one(tmp_path: Path, places: list[Rectangle]) -> None:
    before, model = trained(places), Flat()
    store = CheckpointStore(tmp_path, 1)
    store.save(1, {"model": tiered_state(before)}, {})
    store.restore({"model": flat_state(model)})
    whole = values(before)
    assert (before[0].tier_of() == Tier.NONE).any()
    fresh = torch.from_numpy(initial_rows(3, PATH, 0, ROWS, DIM, 0.1))
    assert torch.equal(whole[ROWS - 1], fresh[ROWS - 1])
    if places == WHOLE:
        assert torch.equal(model.item, whole)
    else:
        torch.testing.assert_close(model.item, whole, rtol=0, atol=0.05)


@pytest.mark.parametrize("places", [WHOLE, GRID], ids=["whole", "grid"])
def test_a_flat_table_enters_tiers_in_the_lowest(tmp_path: Path, places: list[Rectangle]) -> None:
    model, after = Flat(), trained(places)
    nn.init.normal_(model.item)
    store = CheckpointStore(tmp_path, 1)
    store.save(1, {"model": flat_state(model)}, {})
    assert "parts" not in read_manifest(store.folder / "step-00000001").facts
    store.restore({"model": tiered_state(after)})
    for part in after:
        assert (part.tier_of() == Tier.INT8).all()
        assert not part.stat.any()
    torch.testing.assert_close(
        values(after), model.item.detach(), rtol=0, atol=float(model.item.detach().abs().max()) / 254
    )


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.save(1, {"model": nn.ModuleDict({"dense": nn.Linear(3, 2)})}, {})
    with pytest.raises(CheckpointError, match=r"has no 'model.item', which this run needs"):
        store.restore({"model": tiered_state(shards(WHOLE))})


def test_a_flipped_bit_in_a_block_is_found(tmp_path: Path) -> None:
    store = facts_changed(tmp_path, WHOLE)
    (file,) = tmp_path.glob("step-00000001/*.distcp")
    data = bytearray(file.read_bytes())
    at = data.index(b"model.tiers") if b"model.tiers" in data else len(data) // 2
    data[at] ^= 1
    file.write_bytes(data)
    assert verify(file.parent) == [f"{file.name} has changed content"]
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        store.restore({"model": state(shards(WHOLE))})


def test_a_checkpoint_takes_bytes_for_updated_rows_only(tmp_path: Path) -> None:
    rows = 400_000
    big = table((0, rows, 0, DIM), DIM, TableOptimizer())
    step([big], TableOptimizer(), torch.arange(0, 1000), torch.randn(1000, DIM))
    saved = CheckpointStore(tmp_path, 1).save(1, {"model": state([big], rows=rows)}, {})
    assert saved.bytes < 1000 * (big.record_bytes(Tier.INT8) + 16) + 20_000
    assert len(state([big], rows=rows).state_dict()["tiers"]) == 1


def peak_growth(rank: int, world: int, folder: Path) -> tuple[int, int]:
    """Bytes of the table, and by how much the process grew while loading another one."""
    rows, dim, sgd = 12 * BLOCK_ROWS, 32, TableOptimizer(name="sgd")
    before = table((0, rows, 0, dim), dim, sgd)
    for first in range(0, rows, BLOCK_ROWS):
        chosen = torch.arange(first, first + BLOCK_ROWS)
        Reference().write(before, chosen, torch.ones(BLOCK_ROWS, dim), torch.full((BLOCK_ROWS,), int(Tier.FP32)))
    store, shape = CheckpointStore(folder, 1), TableShape("item.weight", rows, dim, ((0, dim),), False, True)
    store.save(1, {"model": ModelState(nn.Linear(3, 2), [before], {PATH: shape})}, {})
    after = table((0, rows, 0, dim), dim, sgd)
    with Growth() as loading:
        store.restore({"model": ModelState(nn.Linear(3, 2), [after], {PATH: shape})})
    assert same(before, after)
    return before.live_bytes, loading.size_bytes


class Growth:
    """How much more memory than at the beginning this process had at most."""

    def __enter__(self) -> "Growth":
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._peak()
        return self

    def __exit__(self, *error: object) -> None:
        self.size_bytes = self._peak() - self._before

    def _peak(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_loading_needs_memory_for_the_table_and_a_block(tmp_path: Path) -> None:
    ((size, loading),) = run_ranks(1, peak_growth, tmp_path, timeout_s=120)
    assert size > 100_000_000
    assert loading < 1.3 * size
