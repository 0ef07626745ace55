"""Bytes that autograd keeps, counted once each, until the graph that keeps them is gone."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thresher.pipeline.runtime.meter import SAVED, SavedBytes


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


KEPT_BYTES = 4 * (5 * 8 + 5 * 16 + 5 * 16)
"""Of 5 rows of fp32 through :func:`network`: the inputs of all three modules."""


def test_inputs_count_and_parameters_do_not() -> None:
    model = network()
    meter = SavedBytes(model.parameters())
    with meter:
        result = model(torch.randn(5, 8)).sum()
    assert meter.live_bytes == meter.peak_bytes == KEPT_BYTES
    result.backward()
    assert meter.live_bytes == 0
    assert meter.peak_bytes == KEPT_BYTES


def test_gradients_are_those_without_a_meter() -> None:
    model, values = network(), torch.randn(5, 8)
    model(values).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SavedBytes(model.parameters()):
        model(values).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_graph_that_is_dropped_counts_no_longer() -> None:
    model = network()
    meter = SavedBytes(model.parameters())
    with meter:
        first, second = model(torch.randn(5, 8)), model(torch.randn(5, 8))
    assert meter.live_bytes == 2 * KEPT_BYTES
    del first
    assert meter.live_bytes == KEPT_BYTES
    del second
    assert meter.live_bytes == 0


def test_storages_count_once_and_whole() -> None:
    values = torch.randn(100, requires_grad=True)
    whole = values * 1
    meter = SavedBytes()
    with meter:
        parts = [whole[:10].square(), whole[50:].square(), whole.view(10, 10).exp()]
    assert meter.live_bytes == 2 * 400
    del parts[2]
    assert meter.live_bytes == 400
    del parts[0]
    assert meter.live_bytes == 400
    parts.clear()
    assert meter.live_bytes == 0


def test_an_address_used_again_counts_again() -> None:
    model = network()
    meter = SavedBytes(model.parameters())
    for _ in range(20):
        with meter:
            model(torch.randn(5, 8)).sum().backward()
    assert meter.live_bytes == 0
    assert meter.peak_bytes == KEPT_BYTES


def test_other_kinds_stand_apart() -> None:
    meter = SavedBytes()
    meter.also("receiving", 1000)
    with meter:
        result = torch.ones(10, requires_grad=True).exp()
    meter.also("receiving", -600)
    del result
    meter.also("receiving", 0)
    assert dict(meter.ledger.peaks) == {"receiving": 1000, SAVED: 40}
    assert meter.ledger.live == {"receiving": 400, SAVED: 0}
    assert meter.ledger.peak == 1040


def test_regions_under_checkpoint_save_their_inputs() -> None:
    model = network()
    meter = SavedBytes(model.parameters())
    values = torch.randn(5, 8, requires_grad=True)
    with meter:
        result = checkpoint(model, values * 2, use_reentrant=False).sum()
    assert meter.live_bytes == 5 * 8 * 4
    result.backward()
    assert meter.live_bytes == 0


class Keeper(torch.autograd.Function):
    """Saves its output and a view of a parameter."""

    @staticmethod
    def forward(ctx, values: Tensor, weight: Tensor) -> Tensor:
        output = values * 2
        ctx.save_for_backward(output, weight.t())
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        output, weight = ctx.saved_tensors
        assert output.shape == gradient.shape
        assert weight.shape == (8, 16)
        return gradient * 2, None


@pytest.mark.parametrize("rows", [5, 0])
def test_saved_outputs_make_no_cycle(rows: int) -> None:
    weight = nn.Parameter(torch.randn(16, 8))
    meter = SavedBytes([weight])
    with meter:
        result = Keeper.apply(torch.randn(rows, 8, requires_grad=True), weight)
    result.sum().backward(retain_graph=True)
    assert meter.live_bytes == rows * 8 * 4
    alive = weakref.ref(result)
    del result
    assert alive() is None
    assert meter.live_bytes == 0


@pytest.mark.parametrize("retain", [True, False])
def test_a_retained_graph_still_counts(retain: bool) -> None:
    meter = SavedBytes()
    with meter:
        result = torch.ones(10, requires_grad=True).exp()
    result.sum().backward(retain_graph=retain)
    assert meter.live_bytes == (40 if retain else 0)
