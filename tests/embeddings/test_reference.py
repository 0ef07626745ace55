"""Lookups and gradients of the reference against ``nn.EmbeddingBag``, in every precision."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.embeddings.group import TableGroup
from thresher.embeddings.init import initial_rows
from thresher.embeddings.kernels.backend import HISTOGRAM_BASE, Table
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.records import read_rows
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.kernels.reference_rules import apply_rule
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.generator import (
    DEMOTED,
    FIRST_STATE,
    SECOND_STATE,
    WEIGHTS,
    random_bits,
    row_keys,
    table_key,
)
from thresher.embeddings.rows.rounding import quantised, to_bf16
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import LEVELS, Tier

SGD = TableOptimizer(name="sgd", lr=1.0)
SHAPES = ((30, 6), (20, 10))
FEATURES = (0, 1, 0)
"""The first table is read by two features."""


@dataclass(frozen=True)
class Lookup:
    """Ids of three features, as tensors."""

    ids: Tensor
    offsets: Tensor
    weights: Tensor
    batch: tuple[int, ...]

    def part(self, feature: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, offsets of bags, and weights of one feature."""
        first = sum(self.batch[:feature])
        ends = self.offsets[first : first + self.batch[feature] + 1]
        ids = slice(int(ends[0]), int(ends[-1]))
        return self.ids[ids], ends[:-1] - ends[0], self.weights[ids]


def draw(seed: int, batch: tuple[int, ...], longest: int = 5) -> Lookup:
    """Bags of up to ``longest`` ids, some empty, with ids that come again."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (sum(batch),), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    n = int(offsets[-1])
    ids = torch.randint(0, 12, (n,), generator=generator)
    return Lookup(ids, offsets, torch.randn(n, generator=generator), batch)


def by_torch(tables: list[Tensor], lookup: Lookup, pooling: Pooling, weighted: bool) -> list[Tensor]:
    """What torch makes of each feature."""
    outputs = []
    for feature, number in enumerate(FEATURES):
        ids, starts, weights = lookup.part(feature)
        if pooling is Pooling.NONE:
            rows = torch.nn.functional.embedding(ids, tables[number])
            outputs.append(rows * weights.unsqueeze(1) if weighted else rows)
            continue
        pooled = torch.nn.functional.embedding_bag(
            ids, tables[number], starts, mode="sum", per_sample_weights=weights if weighted else None
        )
        if pooling is Pooling.MEAN:
            lengths = torch.diff(starts, append=torch.tensor([len(ids)]))
            pooled = pooled / lengths.clamp(min=1).unsqueeze(1)
        outputs.append(pooled)
    return outputs


def flat_tables(shapes: tuple[tuple[int, int], ...]) -> list[FlatTable]:
    generator = torch.Generator().manual_seed(9)
    return [
        FlatTable("t", rows, dim, scalar=False, vectors=0, weights=torch.randn(rows, dim, generator=generator))
        for rows, dim in shapes
    ]


def joined(outputs: list[Tensor], lookup: Lookup, pooling: Pooling) -> Tensor:
    """As the contract lays outputs out."""
    if pooling is Pooling.NONE:
        return torch.cat(outputs)
    if len(set(lookup.batch)) == 1:
        return torch.cat(outputs, dim=1)
    return torch.cat([output.reshape(-1) for output in outputs])


LOOKUPS = {
    "seed": st.integers(0, 1 << 30),
    "batch": st.sampled_from([(4, 4, 4), (1, 1, 1), (0, 0, 0), (3, 0, 5), (1, 7, 2)]),
    "pooling": st.sampled_from(list(Pooling)),
    "weighted": st.booleans(),
    "kind": st.sampled_from([torch.int32, torch.int64]),
}


@settings(max_examples=60)
@given(**LOOKUPS)
def test_outputs_and_gradients_are_those_of_torch(
    seed: int, batch: tuple[int, ...], pooling: Pooling, weighted: bool, kind: torch.dtype
) -> None:
    compare_with_torch(seed, batch, pooling, weighted, kind)


@pytest.mark.slow
@settings(max_examples=2000)
@given(**LOOKUPS)
def test_two_thousand_outputs_and_gradients_are_those_of_torch(
    seed: int, batch: tuple[int, ...], pooling: Pooling, weighted: bool, kind: torch.dtype
) -> None:
    compare_with_torch(seed, batch, pooling, weighted, kind)


def compare_with_torch(seed: int, batch: tuple[int, ...], pooling: Pooling, weighted: bool, kind: torch.dtype) -> None:
    """Rows, and weights of ids where there are any."""
    lookup = draw(seed, batch)
    shapes = ((30, 6), (20, 6)) if pooling is Pooling.NONE else SHAPES
    tables = flat_tables(shapes)
    theirs = [table.weights.clone().requires_grad_() for table in tables]
    mine, other = lookup.weights.clone().requires_grad_(weighted), lookup.weights.clone().requires_grad_(weighted)
    group = TableGroup(tables, FEATURES, pooling, SGD, Reference())
    output = group(lookup.ids.to(kind), lookup.offsets, mine if weighted else None, batch)
    expected = joined(
        by_torch(theirs, Lookup(lookup.ids, lookup.offsets, other, batch), pooling, weighted), lookup, pooling
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    output.backward(gradient)
    expected.backward(gradient)
    for table, weight in zip(tables, theirs, strict=True):
        torch.testing.assert_close(table.weights, weight.detach() - weight.grad, rtol=1e-5, atol=1e-5)
    if weighted:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_gradients_of_weights_are_those_of_finite_differences() -> None:
    """In double precision, where differences mean something; by torch's gradcheck of the same sums."""
    lookup, tables = draw(3, (3, 3, 3)), [table.weights.double() for table in flat_tables(SHAPES)]

    def pooled(weights: Tensor) -> Tensor:
        part = Lookup(lookup.ids, lookup.offsets, weights, lookup.batch)
        return joined(by_torch(tables, part, Pooling.MEAN, True), lookup, Pooling.MEAN)

    weights = lookup.weights.double().requires_grad_()
    assert torch.autograd.gradcheck(pooled, weights)
    gradient = torch.randn(3, 22)
    pooled(weights).backward(gradient.double())
    bags = Bags(lookup.ids, lookup.offsets, lookup.weights, FEATURES, lookup.batch, Pooling.MEAN)
    ours = Reference().weight_gradient(flat_tables(SHAPES), bags, gradient)
    torch.testing.assert_close(ours, weights.grad.float(), rtol=1e-5, atol=1e-5)


def tiered(tier: Tier, rows: int = 30, dim: int = 6, **settings: object) -> TieredTable:
    return TieredTable(
        "t",
        "bags.t",
        rows,
        dim,
        seed=4,
        init_scale=0.5,
        scalar=False,
        vectors=0,
        levels=(tier,),
        entry=tier,
        **settings,
    )


TOLERANCE = {Tier.FP32: 1e-5, Tier.FP16: 1e-2}


@pytest.mark.parametrize("tier", [Tier.FP32, Tier.FP16, Tier.INT8, Tier.INT4])
def test_rows_of_every_precision_read_and_train_as_torchs_do(tier: Tier) -> None:
    """Written to nearest, within half a step of the format; trained with stochastic rounding, within one."""
    backend, table, every = Reference(), tiered(tier), torch.arange(30)
    values = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    backend.write(table, every, values, torch.full((30,), int(tier)))
    stored = backend.read(table, every)
    assert within(stored, values, table, 0.5)
    lookup = draw(5, (4,))
    theirs = stored.clone().requires_grad_()
    group = TableGroup([table], [0], Pooling.SUM, SGD, backend)
    output = group(lookup.ids, lookup.offsets)
    expected = torch.nn.functional.embedding_bag(lookup.ids, theirs, lookup.offsets[:-1], mode="sum")
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(gradient)
    expected.backward(gradient)
    assert within(backend.read(table, every), stored - theirs.grad, table, 1.0)
    untouched = theirs.grad.abs().sum(1) == 0
    assert torch.equal(backend.read(table, every)[untouched], stored[untouched])


def within(read: Tensor, values: Tensor, table: TieredTable, steps: float) -> bool:
    """Whether rows are within so many steps of their format from ``values``."""
    (tier,) = table.levels
    if tier in LEVELS:
        scale = table.desc[:, 1].contiguous().view(torch.float32).unsqueeze(1)
        return bool(((read - values).abs() <= steps * scale * (1 + 1e-5)).all())
    return bool(((read - values).abs() <= TOLERANCE[tier] * values.abs() + TOLERANCE[tier]).all())


def test_rows_never_updated_read_their_initial_values() -> None:
    table = tiered(Tier.INT8, rows=50, dim=4, row0=1000, col0=2, full_dim=8)
    whole = torch.from_numpy(initial_rows(4, "bags.t", 0, 1050, 8, 0.5))
    rows = torch.tensor([49, 0, 23, 24, 23])
    assert torch.equal(Reference().read(table, rows), whole[rows + 1000, 2:6])
    assert table.live(Tier.INT8) == 0


def test_rows_of_dynamic_tables_start_by_their_ids() -> None:
    ids = torch.tensor([1 << 40, -5, 7])
    table = tiered(Tier.INT8, rows=3, dim=4, identity=ids)
    read = Reference().read(table, torch.arange(3))
    for row, number in enumerate(ids.tolist()):
        expected = initial_rows(4, "bags.t", number & ((1 << 64) - 1), 1, 4, 0.5)
        assert torch.equal(read[row], torch.from_numpy(expected)[0])


def mixed(**settings: object) -> TieredTable:
    levels = (Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)
    return TieredTable(
        "t", "t", 12, 4, seed=0, init_scale=0.1, scalar=True, vectors=1, levels=levels, entry=Tier.INT8, **settings
    )


def update(table: Table, rows: list[int], importance: Tensor | None = None, **rule: object) -> object:
    """One update by Adagrad of ones; each row is a bag."""
    ids, backend = torch.tensor(rows), Reference()
    found = backend.sort([table], Bags(ids, torch.arange(len(ids) + 1), None, (0,), (len(ids),), Pooling.SUM))
    settings = TableOptimizer(name="adagrad").rule(0.1, 1, **rule)
    return backend.update([table], found, torch.ones(len(ids), 4), [settings], importance)


def test_rows_move_up_as_far_as_their_priority_says() -> None:
    table = mixed()
    above = (9.0, 9.0, 9.0, 9.0, 1.0, 2.0)
    stats = update(table, [0, 1, 2], torch.tensor([0.5, 1.5, 2.5]), priority_gain=1.0, above=above)
    assert table.tier_of()[:4].tolist() == [Tier.INT8, Tier.FP16, Tier.FP32, Tier.NONE]
    assert (stats.rows, stats.promoted, stats.refused) == (3, 0, 0)
    stats = update(table, [0, 1], torch.tensor([5.0, 0.0]), priority_gain=1.0, above=above)
    assert table.tier_of()[:2].tolist() == [Tier.FP32, Tier.FP16]
    assert (stats.rows, stats.promoted) == (2, 1)
    assert table.live(Tier.INT8) == 0


def test_who_finds_no_slot_stays_and_is_counted() -> None:
    table = mixed(slots={Tier.FP32: 2})
    stats = update(table, [5, 3, 1, 4], priority_gain=1.0, above=(9.0, 9.0, 9.0, 0.5, 9.0, 0.5))
    assert table.tier_of()[[1, 3, 4, 5]].tolist() == [Tier.FP32, Tier.FP32, Tier.INT8, Tier.INT8]
    assert (stats.promoted, stats.refused) == (0, 2)


def test_a_shared_row_gets_one_update_of_its_whole_gradient() -> None:
    table = FlatTable("t", 3, 4, scalar=False, vectors=1)
    group = TableGroup([table], [0, 0], Pooling.SUM, TableOptimizer(name="adagrad", lr=1.0, eps=1e-9), Reference())
    group(torch.tensor([1, 1, 1]), torch.tensor([0, 2, 3])).sum().backward()
    assert table.vectors[0][1].tolist() == [9.0] * 4
    torch.testing.assert_close(table.weights[1], torch.full((4,), -1.0))


def test_rows_go_down_as_far_as_their_priority_says() -> None:
    table, backend = mixed(), Reference()
    update(table, list(range(6)), torch.tensor([0.0, 1.0, 2.0, 3.0, 3.5, 5.0]), priority_gain=1.0, above=(-1.0,) * 6)
    before = backend.read(table, torch.arange(12))
    moved = backend.demote(table, 0, 5, [0.0, 0.0, 0.5, 1.5, 2.5, 3.5])
    tiers = [Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32, Tier.FP32]
    assert table.tier_of()[:7].tolist() == [*tiers, Tier.NONE]
    assert moved == 4
    after = backend.read(table, torch.arange(12))
    assert not after[0].any()
    assert torch.equal(after[4:], before[4:])
    assert 0 < (after[1:4] - before[1:4]).abs().max() < before.abs().max() / 7


def test_a_dropped_row_keeps_only_its_priority_until_it_comes_back() -> None:
    table, backend = mixed(), Reference()
    backend.write(table, torch.tensor([2]), torch.ones(1, 4), torch.tensor([int(Tier.DROPPED)]))
    update(table, [2], priority_gain=0.25, above=(9.0,) * 6)
    assert table.tier_of()[2] == Tier.DROPPED
    assert table.stat[2, 1] == 0.25
    assert not backend.read(table, torch.tensor([2])).any()
    update(table, [2], priority_gain=1.0, above=(9.0, 9.0, 9.0, 9.0, 9.0, 1.0))
    assert table.tier_of()[2] == Tier.FP32
    torch.testing.assert_close(backend.read(table, torch.tensor([2])), torch.full((1, 4), -0.1))


def test_compacting_changes_no_row_and_frees_no_slot_in_use() -> None:
    table, backend, rows = mixed(), Reference(), torch.arange(12)
    update(table, list(range(12)))
    backend.demote(table, 2, 3, [9.0] * 6)
    before = backend.read(table, rows)
    assert table.count[Tier.INT8].tolist() == [12, 3]
    backend.compact(table, Tier.INT8)
    assert table.count[Tier.INT8].tolist() == [9, 0]
    assert torch.equal(backend.read(table, rows), before)


def test_the_histogram_counts_rows_by_eighths_of_octaves() -> None:
    table = mixed()
    table.gain = 4.0
    update(table, [0, 1, 2, 3], torch.tensor([0.0, 4.0, 4.4, 1e30]), priority_gain=1.0)
    counts = Reference().histogram(table)
    one = (127 << 3) - HISTOGRAM_BASE
    assert counts.sum() == 4
    assert counts[[0, one, 511]].tolist() == [1, 2, 1]


def test_nothing_to_look_up_is_no_fault() -> None:
    tables = [mixed(), FlatTable("f", 3, 4, scalar=True, vectors=1)]
    group = TableGroup(tables, [0, 1], Pooling.SUM, TableOptimizer(name="adagrad"), Reference())
    for bags in (0, 2):
        output = group(torch.zeros(0, dtype=torch.int64), torch.zeros(2 * bags + 1, dtype=torch.int64))
        assert output.shape == (bags, 8)
        output.sum().backward()
    assert [table.step for table in tables] == [2, 2]
    assert group.stats.rows == 0


def noise(stream: int, rows: list[int], step: int) -> Tensor:
    return random_bits(row_keys(table_key(0, "t"), torch.tensor(rows), step), 64, stream)


def test_weights_and_state_are_rounded_with_streams_of_their_own() -> None:
    """Adam on an int8 row, and its fall to int4, with the bits that the generator has for each."""
    levels = (Tier.INT4, Tier.INT8)
    table = TieredTable("t", "t", 3, 64, seed=0, init_scale=0.1, scalar=False, vectors=2, levels=levels)
    backend, settings, rows = Reference(), TableOptimizer(name="adam"), torch.tensor([2])
    table.step = 6
    start, g = backend.read(table, rows), torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    found = backend.sort([table], Bags(rows, torch.tensor([0, 1]), None, (0,), (1,), Pooling.SUM))
    rule = settings.rule(0.01, 6)
    backend.update([table], found, g, [rule])
    x, _, vectors = apply_rule(rule, start, g, torch.zeros(1), [torch.zeros(1, 64)] * 2, 64)
    read = read_rows(table, rows, with_state=True)
    scale = x.abs().amax(1) / 127
    assert torch.equal(read.scale, scale)
    assert torch.equal(read.x, scale * quantised(x, scale, Tier.INT8, noise(WEIGHTS, [2], 6)))
    assert torch.equal(read.vectors[0], to_bf16(vectors[0], noise(FIRST_STATE, [2], 6)).float())
    assert torch.equal(read.vectors[1], to_bf16(vectors[1], noise(SECOND_STATE, [2], 6)).float())
    table.step = 7
    assert backend.demote(table, 0, 3, [1.0] * 6) == 1
    low = read_rows(table, rows, with_state=True)
    scale = read.x.abs().amax(1) / 7
    assert torch.equal(low.scale, scale)
    assert torch.equal(low.x, scale * quantised(read.x, scale, Tier.INT4, noise(DEMOTED + WEIGHTS, [2], 7)))
    for before, after in zip(read.vectors, low.vectors, strict=True):
        assert torch.equal(before, after)  # has been rounded to bf16 already


def test_a_scale_does_not_outlive_its_tier() -> None:
    """An int4 row whose largest value would fit an int8 row at the old scale, too."""
    table, backend = mixed(), Reference()
    backend.write(table, torch.tensor([1]), torch.full((1, 4), 7.0), torch.tensor([int(Tier.INT4)]))
    table.desc[1, 1] = torch.tensor(0.001).view(torch.int32)
    update(table, [1], priority_gain=1.0, above=(9.0, 9.0, 9.0, 0.5, 9.0, 9.0))
    found = read_rows(table, torch.tensor([1]), with_state=False)
    assert found.tier.tolist() == [Tier.INT8]
    assert found.scale.item() == pytest.approx(found.x.abs().max().item() / 127, rel=1e-6)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 1 << 45), min_size=1, max_size=5),
    st.sampled_from([(2, 0, 2), (4, 2, 18), (16, 0, 16), (6, 10, 16), (64, 64, 128)]),
)
def test_single_rows_start_as_they_do_in_their_block(numbers: list[int], shape: tuple[int, int, int]) -> None:
    dim, col0, full = shape
    table = tiered(Tier.INT8, rows=len(numbers), dim=dim, col0=col0, full_dim=full, identity=torch.tensor(numbers))
    read = Reference().read(table, torch.arange(len(numbers)))
    for row, number in enumerate(numbers):
        whole = initial_rows(4, "bags.t", number, 1, full, 0.5)[0, col0 : col0 + dim]
        assert read[row].tolist() == whole.tolist()
