"""The order of training samples, against a definition written out row by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.data.order import Order, permutation

GROUPS = st.lists(st.integers(1, 20), min_size=1, max_size=70)


def by_definition(groups: list[int], seed: int, window_rows: int, epoch: int) -> list[int]:
    """One epoch as the module's docstring says, without vectors."""
    rows = sum(groups)
    if rows <= window_rows:
        return list(permutation(rows, seed, epoch, (0, 0, 1)))
    base = np.cumsum([0, *groups])
    stream = [int(base[g]) + i for g in permutation(len(groups), seed, epoch, (0, 0, 0)) for i in range(groups[int(g)])]
    rotation = _rotation(seed, epoch, rows)
    stream = stream[rotation:] + stream[:rotation]
    lanes = 1
    while lanes < 64 and lanes * 2 * max(groups) <= window_rows and lanes * 16 <= len(groups):
        lanes *= 2
    length, depth = rows // lanes, window_rows // lanes
    order = []
    for i in range(lanes * length):
        lane, offset = i % lanes, i // lanes
        window = offset // depth
        inside = permutation(min(depth, length - window * depth), seed, epoch, (window, lane, 1))
        order.append(stream[lane * length + window * depth + int(inside[offset - window * depth])])
    tail = permutation(rows - lanes * length, seed, epoch, (0, 0, 2))
    return order + [stream[lanes * length + int(i)] for i in tail]


def _rotation(seed: int, epoch: int, rows: int) -> int:
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, 3], np.uint64))
    return int(bits.random_raw()) % rows


@given(GROUPS, st.integers(0, 2**64 - 1), st.integers(1, 400), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_is_the_definition_and_a_permutation(groups, seed, window_rows, epoch):
    rows = sum(groups)
    found = Order(groups, seed, window_rows).rows_at(epoch, np.arange(rows))
    assert sorted(found) == list(range(rows))
    assert found.tolist() == by_definition(groups, seed, window_rows, epoch)


@given(GROUPS, st.integers(1, 400), st.data())
@settings(max_examples=100, deadline=None)
def test_random_access_equals_the_sequence(groups, window_rows, data):
    order = Order(groups, 7, window_rows)
    index = np.array(data.draw(st.lists(st.integers(0, order.rows - 1), min_size=1, max_size=50)))
    assert (order.rows_at(1, index) == order.rows_at(1, np.arange(order.rows))[index]).all()


@given(GROUPS, st.integers(1, 400), st.integers(1, 9), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_ranks_take_their_residues(groups, window_rows, world, shuffle, data):
    order = Order(groups, 3, window_rows, shuffle)
    start = data.draw(st.integers(0, order.rows - 1))
    whole = order.rows_at(0, np.arange(order.rows))
    for residue in range(world):
        at, found = start, []
        while at < order.rows:
            window = order.window(0, at, residue, world)
            found += order.numbers(window)[window.take].tolist()
            at = window.stop
        assert found == [int(whole[i]) for i in range(start, order.rows) if i % world == residue]


def test_a_rank_reads_its_own_lanes_only():
    order = Order([8] * 640, 0, window_rows=512)
    assert order.lanes == 64
    for world in (2, 4, 64):
        read = [sum(b - a for _, a, b in order.window(0, 0, r, world).ranges) for r in range(world)]
        assert read == [512 // world] * world


def test_epochs_and_seeds_differ():
    orders = [Order([10] * 100, seed, 100).rows_at(epoch, np.arange(1000)) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one != other).mean() > 0.9


def test_without_shuffling_rows_keep_their_order():
    order = Order([5, 3, 9], 0, window_rows=4, shuffle=False)
    assert order.rows_at(2, np.arange(17)).tolist() == list(range(17))


def test_lanes_fit_their_row_groups_into_the_window():
    assert Order([8192] * 600, 0, 1 << 19).lanes == 64
    assert Order([8192] * 100, 0, 1 << 19).lanes == 8
    assert Order([8192] * 600, 0, 1 << 16).lanes == 8
    assert Order([8192] * 100, 0, 100).lanes == 1
    assert Order([1_000_000] * 10, 0, 1 << 19).lanes == 1


def test_a_batch_mixes_distant_rows():
    rows = Order([100] * 1000, 5, window_rows=6400).rows_at(0, np.arange(640))
    assert len(np.unique(rows // 100)) >= 64


@pytest.mark.parametrize("window_rows", [64, 5000])
def test_positions_are_uniform(window_rows):
    """Mean position of a row over 400 epochs: within 5 standard errors of the middle for all rows."""
    order, epochs = Order([10] * 40, 0, window_rows), 400
    index = np.arange(400)
    where = np.mean([np.argsort(order.rows_at(epoch, index)) for epoch in range(epochs)], axis=0)
    error = 400 / np.sqrt(12 * epochs)
    assert np.abs(where - 199.5).max() < 5 * error


def test_golden_values():
    """The order is part of every saved cursor: these values never change."""
    assert permutation(10, 1, 2, (3, 4, 5)).tolist() == GOLDEN[0]
    assert Order([20] * 5, 11, 1000).rows_at(3, np.arange(12)).tolist() == GOLDEN[1]
    assert Order([4] * 50, 11, 32).rows_at(3, np.arange(12)).tolist() == GOLDEN[2]
    assert Order([7] * 50, 2**64 - 1, 16).rows_at(10**6, np.arange(345, 350)).tolist() == GOLDEN[3]


GOLDEN = [
    [5, 9, 2, 4, 3, 0, 8, 7, 6, 1],
    [84, 46, 81, 41, 37, 30, 1, 56, 95, 94, 89, 86],
    [33, 122, 19, 76, 32, 163, 147, 79, 34, 108, 146, 44],
    [33, 75, 32, 74, 7],
]
