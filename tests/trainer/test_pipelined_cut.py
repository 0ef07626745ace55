"""Samples as microbatches, with their padding and without it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch
from thresher.trainer.pipelined.cut import Cut, PackedCutter, PaddedCutter
from thresher.trainer.pipelined.evaluate import newest_states

LENGTHS = [2, 0, 4, 1, -1, 3]
WIDTH = 4


def samples(lengths: list[int], width: int = WIDTH) -> Microbatch:
    """Token ``place`` of sample ``row`` is 10 row + place + 1; padding is 0."""
    rows, places = torch.arange(len(lengths)).unsqueeze(1), torch.arange(width)
    ids = (10 * rows + places + 1) * (places < torch.tensor(lengths).unsqueeze(1))
    return Microbatch(Layout((0, width), len(lengths)), ids, ids + 1000 * (ids > 0), (ids > 0).float(), ids * 60)


def cut(cutter: PackedCutter | PaddedCutter, lengths: list[int]) -> Cut:
    return cutter.cut(samples(lengths), torch.tensor(lengths))


def test_packed_samples_stand_one_after_the_other():
    (first, second), firsts = cut(PackedCutter(2, 2, 0.0), LENGTHS)
    assert first.inputs.tolist() == [[21, 22, 23, 24, 31]]
    assert first.targets.tolist() == [[1021, 1022, 1023, 1024, 1031]]
    assert first.weights.tolist() == [[1.0] * 5]
    assert first.times is not None
    assert first.times.tolist() == [[1260, 1320, 1380, 1440, 1860]]
    assert first.layout == Layout((0, 3, 5), 1, (0, 4), longest=WIDTH)
    assert second.inputs.tolist() == [[1, 2, 51, 52, 53]]
    assert second.layout == Layout((0, 3, 5), 1, (0, 2), longest=WIDTH)
    assert [firsts[row].item() for row in (0, 2, 3, 5)] == [5, 0, 4, 7]


def test_too_few_tokens_are_filled_up_with_sequences_of_one():
    (first, second), _ = cut(PackedCutter(2, 3, 0.0), [0, 2])
    assert first.inputs.tolist() == [[11, 12, 0]]
    assert first.weights.tolist() == [[1, 1, 0]]
    assert first.layout == Layout((0, 1, 2, 3), 1, (0, 2), longest=WIDTH)
    assert second.weights.tolist() == [[0, 0, 0]]
    assert second.layout == Layout((0, 1, 2, 3), 1, (0, 1, 2), longest=WIDTH)


@pytest.mark.parametrize("cutter", [PackedCutter(2, 3, 0.0), PaddedCutter(2, (0, 2, 4))])
def test_newest_states_are_found_whatever_the_cut(cutter):
    microbatches, firsts = cut(cutter, LENGTHS)
    hidden = [microbatch.inputs.unsqueeze(2).double() for microbatch in microbatches]
    newest = newest_states(hidden, firsts, torch.tensor(LENGTHS) - 1)
    assert newest.flatten().tolist() == [2, 0, 24, 31, 0, 53]


@given(st.lists(st.integers(-1, WIDTH), min_size=1, max_size=20), st.integers(1, 4), st.integers(1, 9), st.floats(0, 9))
def test_no_token_is_lost_and_no_slice_is_empty(lengths, parts, slices, per_pair):
    microbatches, _ = cut(PackedCutter(parts, slices, per_pair), lengths)
    ids = sorted(i for m in microbatches for i in m.inputs.flatten().tolist() if i)
    assert ids == sorted(samples(lengths).inputs[samples(lengths).inputs > 0].tolist())
    for layout in (microbatch.layout for microbatch in microbatches):
        assert (layout.slices, layout.bounds[0], layout.divisor) == (slices, 0, WIDTH)
        assert all(layout.length(index) >= 1 for index in range(slices))
    counts = [int((m.inputs > 0).sum()) for m in microbatches]
    assert max(counts) - min(counts) <= WIDTH


def test_balanced_slices_cost_the_same():
    lengths = [400, 30, 170]
    cutter = PackedCutter(1, 4, 0.05)
    (microbatch,), _ = cutter.cut(samples(lengths, 400), torch.tensor(lengths))
    spent = [
        float((1 + 0.05 * (microbatch.layout.positions(index) + 1)).sum()) for index in range(microbatch.layout.slices)
    ]
    assert max(spent) - min(spent) < 25 < 0.01 * sum(spent)
    assert microbatch.layout.length(1) < microbatch.layout.length(0)
