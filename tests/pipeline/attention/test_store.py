"""Where slices lie in pools, and what a store keeps of them."""

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.pipeline.attention.one_rank import one_rank_store
from thresher.pipeline.attention.regions import Regions, Rows, history, moved, plan_regions
from thresher.pipeline.attention.store import KVStore, make_stores
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.ops import Kind, Op, Schedule

FORWARDS_AND_BACKWARDS = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD)
MICROBATCHES, SLICES, TOKENS = 3, 4, 10


def walk(ops: list[Op], regions: Sequence[Regions]) -> tuple[int, int]:
    """Executes ops of one pool on rows alone, checks every slice; returns the most live rows and the most pieces."""
    rows: dict[int, tuple[int, int, int]] = {}
    most = pieces = 0
    for op in ops:
        region, block = regions[op.chunk], (op.microbatch, op.chunk)
        low, high = region.layouts[op.microbatch].bounds[op.slice : op.slice + 2]
        if op.kind is not Kind.FORWARD:
            rows = {row: what for row, what in rows.items() if what[:2] != block or what[2] < low}
            continue
        (own,) = region.rows(op.microbatch, range(low, high))
        taken = {own.first + i: (*block, token) for i, token in enumerate(own.tokens[0])}
        assert not taken.keys() & rows.keys()
        assert 0 <= own.first < own.last <= region.capacity
        rows |= taken
        most = max(most, len(rows))
        found = region.rows(op.microbatch, range(low))
        tokens = {part.first + i: t for part in found for i, t in enumerate(t for run in part.tokens for t in run)}
        assert tokens == {row: t for row, (*of, t) in rows.items() if tuple(of) == block and t < low}
        pieces = max(pieces, len(found))
    return most, pieces


def pool_of(schedule: Schedule, rank: int, regions: Sequence[Regions], pool: int) -> list[Op]:
    return [op for op in schedule.of(rank, *FORWARDS_AND_BACKWARDS) if regions[op.chunk].pool == pool]


@pytest.mark.parametrize(
    ("stages", "chunks", "microbatches", "slices"),
    [(2, 1, 2, 4), (2, 2, 4, 8), (4, 1, 8, 8), (4, 2, 2, 8), (4, 2, 3, 10), (1, 3, 2, 6), (2, 1, 1, 4), (8, 2, 3, 16)],
)
def test_even_slices_need_no_more_room_than_is_live(stages: int, chunks: int, microbatches: int, slices: int) -> None:
    schedule = build_schedule(stages, chunks, microbatches, slices)
    layouts = [Layout(even_bounds(3 * slices, slices))] * microbatches
    for rank in range(stages):
        regions = plan_regions(schedule, rank, layouts)
        for pool, region in enumerate(regions):
            assert region.pool == pool
            assert walk(pool_of(schedule, rank, regions, pool), regions) == (region.capacity, 1)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (2, 3), (4, 2), (3, 4)])
def test_chunks_of_the_last_rank_share_what_is_live(stages: int, chunks: int) -> None:
    slices = 2 * stages
    schedule = build_schedule(stages, chunks, 3, slices)
    regions = plan_regions(schedule, stages - 1, [Layout(even_bounds(slices, slices))] * 3, [2] * chunks)
    assert [region.pool for region in regions] == [min(chunk, chunks - 1 - chunk) for chunk in range(chunks)]
    pools = {region.pool: region.capacity for region in regions}
    assert sum(pools.values()) == slices * chunks
    for pool, capacity in pools.items():
        assert walk(pool_of(schedule, stages - 1, regions, pool), regions) == (capacity, 1)


def test_chunks_of_unequal_layers_share_nothing() -> None:
    schedule = build_schedule(2, 2, 3, 4)
    regions = plan_regions(schedule, 1, [Layout(even_bounds(4, 4))] * 3, [2, 1])
    assert [region.pool for region in regions] == [0, 1]


@given(data=st.data())
@settings(max_examples=60)
def test_any_schedule_has_room_for_any_slices(data: st.DataObject) -> None:
    stages, chunks = data.draw(st.integers(1, 4), "stages"), data.draw(st.integers(1, 3), "chunks")
    slices, microbatches = data.draw(st.integers(max(2, stages), 8), "slices"), data.draw(st.integers(1, 5), "count")
    lengths = st.lists(st.integers(1, 9), min_size=slices, max_size=slices)
    bounds = [[sum(drawn[:i]) for i in range(slices + 1)] for drawn in data.draw(st.lists(lengths, min_size=5))]
    layouts = [Layout(tuple(bounds[k % len(bounds)])) for k in range(microbatches)]
    split = data.draw(st.booleans(), "split")
    schedule = build_schedule(stages, chunks, microbatches, slices, split_backward=split)
    rank = data.draw(st.integers(0, stages - 1), "rank")
    layers = data.draw(st.sampled_from([(), (1,) * chunks]), "layers")
    regions = plan_regions(schedule, rank, layouts, layers)
    for pool, region in {region.pool: region for region in regions}.items():
        most, pieces = walk(pool_of(schedule, rank, regions, pool), regions)
        assert most <= region.capacity
        assert pieces <= 1


@pytest.mark.parametrize("policy", ["gpipe", "terapipe", "seq1f1b"])
def test_other_policies_have_room(policy: str) -> None:
    slices = 1 if policy == "gpipe" else 4
    schedule = build_schedule(2, 1, 3, slices, policy=policy)
    regions = plan_regions(schedule, 0, [Layout(even_bounds(12, slices))] * 3)
    if slices == 1:
        assert regions[0].capacity == 0
    else:
        assert walk(pool_of(schedule, 0, regions, 0), regions) == (regions[0].capacity, 1)


def test_a_new_microbatch_grows_into_the_room_that_is_given_back() -> None:
    schedule = build_schedule(2, 1, 3, SLICES)
    (regions,) = plan_regions(schedule, 0, [Layout(even_bounds(SLICES, SLICES))] * 3)
    assert regions == Regions(regions.layouts, 6, ((0, 1, 2, 3), (5, 4, 3, 2), (1, 0, 2, 3)), pool=0)
    assert regions.rows(2, range(4)) == (Rows(0, (range(1, 2), range(1), range(2, 3), range(3, 4))),)
    assert regions.rows(2, range(1, 3)) == (Rows(0, (range(1, 2),)), Rows(2, (range(2, 3),)))


def test_wasteful_room_where_nothing_else_fits() -> None:
    slices, microbatches = 16, 4
    lengths = [130 - 60 * i // slices for i in range(slices)]
    layout = Layout(tuple(sum(lengths[:i]) for i in range(slices + 1)))
    schedule = build_schedule(8, 1, microbatches, slices)
    regions = plan_regions(schedule, 0, [layout] * microbatches)
    assert regions[0].capacity == 3 * layout.tokens
    assert walk(pool_of(schedule, 0, regions, 0), regions)[1] == 1


def test_chunks_that_share_rows_share_pools() -> None:
    schedule, layout = build_schedule(2, 2, 3, 4), Layout((0, 3, 6, 9, 12))
    first, second = make_stores(plan_regions(schedule, 1, [layout] * 3, [2, 2]))
    for layer in (0, 1):
        filled(first, 1, layer)
        filled(second, 1, layer + 2)
    assert first.bytes == second.bytes == 2 * 2 * 24 * 2 * 3 * 4
    assert all(second.holds(first.own(layer, 0, 0)[0]) for layer in (0, 1))
    assert torch.equal(first.own(1, 0, 0)[0], pair(0, 3)[0])
    second.regions = first.regions
    second.release(0, 0)
    with pytest.raises(AssertionError, match="over slice 0 of microbatch 0 of layer 0"):
        second.write(2, 0, 0, *pair(1, 3))


def store_of(*layouts: Layout) -> KVStore:
    return one_rank_store(layouts)


def pair(seed: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, 1, 2, tokens, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return drawn[0], drawn[1]


def filled(store: KVStore, slices: int, layer: int = 0, microbatch: int = 0) -> list[tuple[Tensor, Tensor]]:
    layout = store.regions.layouts[microbatch]
    pairs = [pair(10 * microbatch + i, layout.length(i)) for i in range(slices)]
    for index, values in enumerate(pairs):
        store.write(layer, microbatch, index, *values)
    return pairs


LAYOUT = Layout((0, 3, 4, 8, TOKENS))


def test_pools_come_with_the_first_write_and_go_with_the_last_release() -> None:
    store = store_of(LAYOUT, LAYOUT)
    assert store.bytes == 0
    filled(store, 2)
    filled(store, 1, layer=1)
    assert store.bytes == 2 * 2 * TOKENS * 2 * 3 * 4
    store.forget(0)
    assert store.bytes == 0
    store.require_empty()


def test_what_is_written_can_be_read_in_any_pieces() -> None:
    store = store_of(LAYOUT)
    pairs = filled(store, 3)
    keys, values = (torch.cat([p[i] for p in pairs], 2) for i in (0, 1))
    for first, last in [(0, 8), (2, 7), (3, 4), (4, 4)]:
        parts = store.parts(0, 0, range(first, last))
        order = [t for part in parts for run in part.tokens for t in run]
        assert sorted(order) == list(range(first, last))
        for part in parts:
            tokens = [t for run in part.tokens for t in run]
            assert torch.equal(part.key, keys[:, :, tokens])
            assert torch.equal(part.value, values[:, :, tokens])
    key, value = store.gather(0, 0, range(2, 7))
    assert torch.equal(key, keys[:, :, 2:7])
    assert torch.equal(value, values[:, :, 2:7])
    assert key.is_contiguous()


def test_pools_are_told_from_other_tensors() -> None:
    store = store_of(LAYOUT)
    ((key, _),) = filled(store, 1)
    own = store.own(0, 0, 0)
    assert [store.holds(x) for x in (*own, key)] == [True, True, False]


def test_later_writes_do_not_count_as_changes_of_earlier_slices() -> None:
    store = store_of(LAYOUT)
    filled(store, 1)
    own, _ = store.own(0, 0, 0)
    version = own._version
    store.write(0, 0, 1, *pair(1, 1))
    assert own._version == version


def middle(schedule_microbatches: int = 3) -> KVStore:
    """A pool in which microbatch 2 lies on both sides of its slice 0."""
    schedule = build_schedule(2, 1, schedule_microbatches, SLICES)
    return KVStore(plan_regions(schedule, 0, [LAYOUT] * schedule_microbatches)[0])


@pytest.mark.parametrize("microbatch", range(MICROBATCHES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_later_slices_add_up_where_they_belong(microbatch: int, dtype: torch.dtype) -> None:
    store = middle()
    for index in range(SLICES):
        store.write(7, microbatch, index, *pair(index, LAYOUT.length(index), dtype))
    expected = torch.zeros(2, 1, 2, TOKENS, 3, dtype=torch.float64)
    for index in reversed(range(SLICES)):
        low, high = LAYOUT.bounds[index], LAYOUT.bounds[index + 1]
        for part in store.parts(7, microbatch, range(min(low, 1), low)):
            gradients = pair(20 + index, part.key.shape[2], dtype)
            tokens = [t for run in part.tokens for t in run]
            expected[:, :, :, tokens] += torch.stack(gradients)
            store.add(7, microbatch, part, gradients)
        if index > 1:
            gradients = pair(30 + index, low, dtype)
            expected[:, :, :, :low] += torch.stack(gradients)
            store.add_tokens(7, microbatch, range(low), gradients)
        found = store.take(7, microbatch, index)
        store.release(microbatch, index)
        if index == SLICES - 1:
            assert found is None
        else:
            assert found is not None
            assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.allclose(torch.stack(found).double(), expected[:, :, :, low:high], atol=1e-6)
    assert store.accumulator_bytes == 0
    store.require_empty()


def test_the_first_gradients_become_the_accumulators() -> None:
    store = store_of(LAYOUT)
    filled(store, SLICES)
    (part,) = store.parts(0, 0, range(8))
    gradients = pair(1, 8)
    store.add(0, 0, part, gradients)
    assert store.accumulator_bytes == 2 * 8 * 2 * 3 * 4
    store.take(0, 0, 3)
    store.release(0, 3)
    found = store.take(0, 0, 2)
    assert found is not None
    assert found[0].untyped_storage().data_ptr() == gradients[0].untyped_storage().data_ptr()


def test_slices_must_come_in_order() -> None:
    store = store_of(LAYOUT)
    filled(store, 1)
    with pytest.raises(AssertionError, match="slice 2 of microbatch 0 written after 1 slices"):
        store.write(0, 0, 2, *pair(0, 4))
    store.write(0, 0, 0, *pair(0, 3))


def test_slices_must_go_newest_first() -> None:
    store = store_of(LAYOUT)
    filled(store, 2)
    with pytest.raises(AssertionError, match="layer 0 releases slice 0 of microbatch 0 while 2 slices are live"):
        store.release(0, 0)
    with pytest.raises(AssertionError, match="backward of slice 0 of microbatch 0 while 2 slices are live"):
        store.take(0, 0, 0)


def test_gradients_must_be_taken_before_the_release() -> None:
    store = store_of(LAYOUT)
    filled(store, 1)
    store.add_tokens(0, 0, range(3), pair(0, 3))
    with pytest.raises(AssertionError, match="releases microbatch 0 before the backward of its slice 0"):
        store.release(0, 0)


def test_live_slices_are_never_overwritten() -> None:
    store = store_of(LAYOUT, LAYOUT)
    filled(store, 2)
    with pytest.raises(
        AssertionError, match="would write slice 0 of microbatch 1 over slice 0 of microbatch 0 of layer 0"
    ):
        store.write(0, 1, 0, *pair(0, 3))


def test_one_dtype_per_layer() -> None:
    store = store_of(LAYOUT)
    filled(store, 1)
    with pytest.raises(AssertionError, match=r"keeps torch\.float32 and was given torch\.float64"):
        store.write(0, 0, 1, *pair(0, 1, torch.float64))


def test_what_is_left_is_named() -> None:
    store = store_of(LAYOUT)
    filled(store, 2, layer=4)
    with pytest.raises(AssertionError, match=r"\(layer, microbatch, slices\): \[\(4, 0, 2\)\]"):
        store.require_empty()


def test_smaller_batches_use_part_of_the_pool() -> None:
    wide = Layout(LAYOUT.bounds, 2)
    store = store_of(LAYOUT, wide)
    filled(store, 1)
    assert store.own(0, 0, 0)[0].shape == (1, 2, 3, 3)
    assert store.bytes == 2 * 2 * TOKENS * 2 * 3 * 4


def test_history_is_what_the_first_piece_looks_back_at() -> None:
    layout = Layout((0, 3, 6, 9, 12), 1, (0, 4, 6, 11))
    assert [history(layout, index) for index in range(4)] == [range(0), range(3), range(6, 6), range(6, 9)]
    assert moved(layout, 1, 1) == range(3)
    assert not moved(layout, 3, 2)
    assert moved(layout, 3, 3) == range(6, 9)
