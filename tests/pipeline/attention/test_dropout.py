"""Dropout by key: the same mask wherever it is drawn, nothing kept for backward."""

from dataclasses import replace

import pytest
import torch

from thresher.errors import ConfigError
from thresher.pipeline.attention.dropout import DropKey, keyed_dropout
from thresher.pipeline.runtime.meter import SavedBytes

KEY = DropKey(seed=1, step=2, microbatch=3, slice=4, layer=5, site=6)


def mask(key: DropKey, share: float = 0.5, tokens: int = 64) -> torch.Tensor:
    return keyed_dropout(torch.ones(2, tokens, 8), share, [key], [tokens])


def test_one_key_gives_one_mask_whatever_was_drawn_before() -> None:
    first = mask(KEY)
    torch.rand(10)
    assert torch.equal(first, mask(KEY))


@pytest.mark.parametrize("field", ["seed", "step", "microbatch", "slice", "layer", "site"])
def test_every_part_of_the_key_counts(field: str) -> None:
    other = replace(KEY, **{field: getattr(KEY, field) + 1})
    assert 0.4 < (mask(KEY) != mask(other)).double().mean() < 0.6


def test_parts_of_the_key_are_not_interchangeable() -> None:
    assert not torch.equal(mask(replace(KEY, layer=6, site=5)), mask(KEY))


@pytest.mark.parametrize("share", [0.1, 0.75])
def test_share_of_zeros_and_scale_of_the_rest(share: float) -> None:
    values = mask(KEY, share, tokens=5000)
    assert abs((values == 0).double().mean() - share) < 0.01
    assert torch.allclose(values[values != 0], torch.tensor(1 / (1 - share)))


def test_backward_has_the_mask_of_forward_and_keeps_nothing() -> None:
    values = torch.ones(2, 6, 4, dtype=torch.float64, requires_grad=True)
    with SavedBytes() as meter:
        out = keyed_dropout(values, 0.5, [KEY], [6])
        assert meter.live_bytes == 0
    out.backward(3 * torch.ones_like(out))
    assert torch.equal(values.grad, 3 * out)


def test_slices_of_a_whole_have_their_own_masks() -> None:
    keys = [replace(KEY, slice=i) for i in range(3)]
    lengths = [5, 1, 3]
    whole = keyed_dropout(torch.ones(2, 9, 4), 0.5, keys, lengths)
    parts = [keyed_dropout(torch.ones(2, n, 4), 0.5, [key], [n]) for key, n in zip(keys, lengths, strict=True)]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_masks_do_not_depend_on_dtype() -> None:
    half = keyed_dropout(torch.ones(2, 64, 8, dtype=torch.bfloat16), 0.5, [KEY], [64])
    assert torch.equal(half.float(), mask(KEY))


def test_no_share_is_identity() -> None:
    values = torch.ones(1, 2, 3)
    assert keyed_dropout(values, 0.0, [KEY], [2]) is values


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"dropout of a share of {share}"):
        keyed_dropout(torch.ones(1, 2, 3), share, [KEY], [2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda() -> None:
    values = torch.ones(2, 5000, 8, device="cuda", requires_grad=True)
    out = keyed_dropout(values, 0.25, [KEY], [5000])
    out.sum().backward()
    assert torch.equal(values.grad, out)
    assert abs((out == 0).double().mean() - 0.25) < 0.01
