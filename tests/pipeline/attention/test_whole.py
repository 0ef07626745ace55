"""The whole microbatch at once: what sliced runs are compared with."""

import pytest
import torch

from tests.pipeline.attention.softmax_case import LAYER, Step, microbatch_of
from thresher.pipeline.attention.whole import WholeContext
from thresher.pipeline.layout import Layout

PACKED = Layout((0, 4, 8, 12), 1, (0, 5, 7))


def whole(layout: Layout, *, training: bool = True) -> WholeContext:
    return WholeContext(microbatch_of(layout), 1, seed=0, step=0, training=training)


def test_attention_never_crosses_a_sequence() -> None:
    step = Step([PACKED])
    query, key, value = step.inputs(0)
    out = whole(PACKED).attend(LAYER, query, key, value)
    changed = value.clone()
    changed[:, :, :5] += 1
    again = whole(PACKED).attend(LAYER, query, key, changed)
    assert torch.equal(out[:, :, 5:], again[:, :, 5:])
    assert not torch.allclose(out[:, :, 1:5], again[:, :, 1:5])


@pytest.mark.parametrize("starts", [(0,), (0, 5, 7)])
def test_attention_is_that_of_a_mask(starts: tuple[int, ...]) -> None:
    layout = Layout((0, 12), 1, starts)
    query, key, value = Step([layout]).inputs(0)
    tokens = torch.arange(12)
    sequence = torch.bucketize(tokens, torch.tensor(starts), right=True)
    visible = (tokens.unsqueeze(1) >= tokens) & (sequence.unsqueeze(1) == sequence)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    assert torch.allclose(whole(layout).attend(LAYER, query, key, value), expected, atol=1e-12)


def test_positions_count_from_the_beginning_of_each_sequence() -> None:
    assert whole(PACKED).positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]


def test_no_dropout_in_evaluation() -> None:
    values = torch.ones(1, 12, 3)
    assert whole(PACKED, training=False).drop(values, 0.5, LAYER) is values
    assert not torch.equal(whole(PACKED).drop(values, 0.5, LAYER), values)
