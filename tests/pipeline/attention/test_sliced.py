"""What the layers of a trunk see of a slice: positions, dropout and dtypes equal those of the whole."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.pipeline.attention.one_rank import one_rank_store
from tests.pipeline.attention.softmax_case import LAYER, microbatch_of
from thresher.pipeline.attention.sliced import SlicedContext, cast_inputs
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.attention.whole import WholeContext
from thresher.pipeline.layout import Layout

LAYOUTS = [Layout((0, 4, 8, 12)), Layout((0, 4, 8, 12), 3), Layout((0, 5, 6, 12), 1, (0, 5, 7, 8))]
KEYS = {"seed": 3, "step": 4}


def contexts(layout: Layout, *, training: bool = True) -> tuple[KVStore, list[SlicedContext], WholeContext]:
    store, microbatch = one_rank_store([layout]), microbatch_of(layout)
    slices = range(layout.slices)
    cut = [SlicedContext(store, microbatch, 0, index, **KEYS, training=training) for index in slices]
    return store, cut, WholeContext(microbatch, 0, **KEYS, training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions(layout: Layout) -> None:
    _, cut, whole = contexts(layout)
    assert torch.cat([context.positions for context in cut]).equal(whole.positions)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_equals_that_of_the_whole(layout: Layout) -> None:
    _, cut, whole = contexts(layout)
    values = torch.ones(layout.batch, layout.tokens, 16)
    dropped = whole.drop(values, 0.5, LAYER, 2)
    parts = [context.drop(context.microbatch.cut(values, context.index), 0.5, LAYER, 2) for context in cut]
    assert torch.cat(parts, 1).equal(dropped)
    assert not dropped.equal(whole.drop(values, 0.5, LAYER, 1))
    assert not dropped.equal(whole.drop(values, 0.5, LAYER + 1, 2))


def test_no_dropout_in_evaluation() -> None:
    _, cut, _ = contexts(LAYOUTS[0], training=False)
    values = torch.ones(1, 4, 3)
    assert cut[0].drop(values, 0.5, LAYER) is values


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_of_a_trunk_equals_the_whole(layout: Layout, again: bool) -> None:
    """Two layers with dropout and rotated-like positions, with and without recomputation."""
    torch.manual_seed(0)
    store, cut, whole = contexts(layout)
    values = torch.randn(layout.batch, layout.tokens, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 36, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor, context: SlicedContext | WholeContext, index: int) -> torch.Tensor:
        projected = (x + context.positions.unsqueeze(-1) / 10) @ weight
        query, key, value = projected.unflatten(2, (3, 2, 6)).transpose(1, 3).unbind(2)
        out = context.attend(index, query, key, value).transpose(1, 2).flatten(2)
        return x + context.drop(out, 0.25, index)

    def trunk(x: torch.Tensor, context: SlicedContext | WholeContext) -> torch.Tensor:
        for index in (0, 1):
            x = checkpoint(layer, x, context, index, use_reentrant=False) if again else layer(x, context, index)
        return x

    dout = torch.randn(layout.batch, layout.tokens, 12, dtype=torch.float64)
    expected = trunk(values, whole)
    gradients = torch.autograd.grad(expected, (values, weight), dout)
    outs = [trunk(context.microbatch.cut(values, context.index), context) for context in cut]
    for context, out in reversed(list(zip(cut, outs, strict=True))):
        context.again()
        out.backward(context.microbatch.cut(dout, context.index))
        store.release(0, context.index)
    store.require_empty()
    assert torch.allclose(torch.cat(outs, 1), expected, atol=1e-12)
    assert torch.allclose(values.grad, gradients[0], atol=1e-12)
    assert torch.allclose(weight.grad, gradients[1], atol=1e-11)


def test_evaluation_forgets_a_microbatch_after_its_last_slice() -> None:
    store, cut, whole = contexts(LAYOUTS[0], training=False)
    inputs = torch.randn(3, 1, 2, 12, 4, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        outs = [
            context.attend(LAYER, *(x[:, :, 4 * context.index : 4 * context.index + 4] for x in inputs))
            for context in cut
        ]
    store.forget(0)
    store.require_empty()
    assert torch.allclose(torch.cat(outs, 2), whole.attend(LAYER, *inputs), atol=1e-6)


def test_autocast_lowers_all_but_double() -> None:
    single, double = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert cast_inputs(single, single, single)[0] is single
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cast_inputs(single, single, single.bfloat16())
        assert [x.dtype for x in mixed] == [torch.bfloat16] * 3
        assert cast_inputs(double, double, double)[0] is double
