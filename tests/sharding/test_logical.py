"""Tables with tiers seen as tensors: what reads, what writes, what is refused, and that nothing takes their size."""

import io
import math

import pytest
import torch
from torch import Tensor, nn

from thresher.embeddings.kernels.backend import pick_backend
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import PlanError
from thresher.sharding.logical import LogicalRows, Window, is_finite

CPU = torch.device("cpu")
TIERS = torch.tensor([Tier.INT8, Tier.FP16, Tier.FP32, Tier.NONE])


def table(rows: int = 12, seed: int = 1) -> TieredTable:
    made = TieredTable("t", "bags.t", rows, 8, seed=seed, init_scale=0.5, scalar=True, vectors=1)
    chosen = torch.arange(0, rows, 2)
    values = torch.randn(len(chosen), 8, generator=torch.Generator().manual_seed(seed))
    pick_backend(CPU).write(made, chosen, values, TIERS.repeat(rows)[: len(chosen)])
    return made


def values_of(made: TieredTable) -> Tensor:
    return pick_backend(CPU).read(made, torch.arange(made.rows))


def shown(made: TieredTable) -> LogicalRows:
    return LogicalRows([Window(made, 0, made.rows)])


def test_reading_decodes() -> None:
    made = table()
    rows, values = shown(made), values_of(made)
    assert rows.shape == (12, 8)
    assert rows.dtype is torch.float32
    assert torch.equal(rows.cpu(), values)
    assert torch.equal(rows + 1, values + 1)
    assert torch.equal(rows[3:7].read(), values[3:7])
    assert torch.equal(rows[:, 2:4], values[:, 2:4])
    assert torch.equal(rows.view(-1), values.view(-1))
    assert torch.equal(torch.empty(12, 8).copy_(rows), values)


def test_views_keep_no_copy() -> None:
    rows = shown(table())
    for view in (rows.detach(), rows[2:5], rows.view(-1, 8), rows.view(12, 8), nn.Parameter(rows)):
        assert isinstance(view, LogicalRows)
        assert view.untyped_storage().nbytes() == 0 or view.data_ptr() == 0


def test_windows_of_several_tables_lie_one_below_the_other() -> None:
    one, two = table(5, 1), table(7, 2)
    rows = LogicalRows([Window(one, 0, 5), Window(two, 0, 7)])
    both = torch.cat([values_of(one), values_of(two)])
    assert torch.equal(rows.read(), both)
    assert torch.equal(rows[3:9].read(), both[3:9])


def test_copying_encodes_into_the_tiers_of_the_rows() -> None:
    made = table()
    tiers = made.tier_of().clone()
    wanted = torch.randn(12, 8)
    shown(made).copy_(wanted)
    expected = torch.where(tiers == Tier.NONE, int(made.entry), tiers)
    assert torch.equal(made.tier_of(), expected)
    found = values_of(made)
    exact = expected == Tier.FP32
    assert torch.equal(found[exact], wanted[exact])
    assert (found - wanted).abs().max() < wanted.abs().max() / 127


def test_copying_a_table_onto_itself_does_nothing() -> None:
    made = table()
    before = made.desc.clone()
    shown(made).copy_(shown(made)[0:12])
    assert torch.equal(made.desc, before)


def test_part_of_a_table_can_be_written() -> None:
    made, before = table(), values_of(table())
    shown(made)[4:6].copy_(torch.ones(2, 8))
    after = values_of(made)
    assert torch.allclose(after[4:6], torch.ones(2, 8), atol=1e-6)
    kept = torch.tensor([n for n in range(12) if n not in (4, 5)])
    assert torch.equal(after[kept], before[kept])


@pytest.mark.parametrize("fill", [nn.init.zeros_, lambda rows: nn.init.uniform_(rows, -1, 1), nn.init.normal_])
def test_tables_can_be_filled_anew(fill: object) -> None:
    made = table()
    before = values_of(made)
    fill(nn.Parameter(shown(made)))  # type: ignore[operator]
    after = values_of(made)
    assert not torch.equal(after, before)
    assert bool((made.tier_of() != Tier.NONE).all())


def test_other_changes_in_place_are_refused() -> None:
    with pytest.raises(PlanError, match=r"table 'bags\.t'.* would change rows with tiers in place.*copy_"):
        shown(table()).add_(1.0)


def test_saving_writes_a_plain_tensor() -> None:
    made, file = table(), io.BytesIO()
    torch.save({"weight": shown(made)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    assert type(loaded) is Tensor
    assert torch.equal(loaded, values_of(made))


@pytest.mark.parametrize("tier", [Tier.FP16, Tier.FP32])
def test_numbers_that_are_not_finite_are_found_without_decoding(tier: Tier) -> None:
    made = table()
    assert is_finite(shown(made))
    records = made.slabs[tier][: made.record_bytes(tier)]
    records.view(torch.float32 if tier is Tier.FP32 else torch.float16)[0] = math.nan
    assert not is_finite(shown(made))


def test_scales_and_optimizer_state_are_looked_at_too() -> None:
    made = table()
    made.desc[0, 1] = torch.tensor([math.inf]).view(torch.int32)[0]
    assert not is_finite(shown(made))
    other = table()
    other.slabs[Tier.INT8][8 : other.record_bytes(Tier.INT8)].view(torch.bfloat16)[0] = math.inf
    assert not is_finite(shown(other))


def test_plain_tensors_are_finite_or_not() -> None:
    assert is_finite(torch.full((4,), 3e38))
    assert not is_finite(torch.tensor([1.0, math.nan]))
