"""Pointwise attention, deferred weight gradients and offload on a CUDA device."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from tests.pipeline.attention.one_rank import in_turn, one_rank_store
from tests.pipeline.attention.pointwise_case import Case, largest_difference
from thresher.pipeline.attention import pointwise
from thresher.pipeline.layout import Layout
from thresher.pipeline.runtime.meter import SavedBytes
from thresher.pipeline.runtime.offload import HOST, Offloader, pinned_mover
from thresher.pipeline.runtime.weights import SplitLinear, WeightQueue, attach_queue
from thresher.pipeline.schedule.ops import Kind

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("batch", "starts"), [(3, (0,)), (1, (0, 2, 3, 11, 12))], ids=["rows", "packed"])
@pytest.mark.parametrize("slices", [1, 4, 8])
@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize("number", [0, 1])
def test_pointwise_slices_equal_the_whole(
    slices: int, batch: int, starts: tuple[int, ...], biases: int, number: int, monkeypatch
) -> None:
    monkeypatch.setattr(pointwise, "DEVICE_EDGE", 3)
    case = Case(slices, batch, starts, biases, number, device="cuda")
    on_host = Case(slices, batch, starts, biases, number)
    assert largest_difference(case.sliced(), case.whole()) < 1e-12
    assert largest_difference([x.cpu() for x in case.sliced()], on_host.whole()) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_pointwise_with_long_slices(dtype: torch.dtype, limit: float) -> None:
    """Relative to the largest number, against double precision on the same rounded inputs."""
    case = Case(2, tokens=3000, width=64, device="cuda", dtype=dtype)
    exact = Case(2, tokens=3000, width=64, device="cuda")
    for leaf, rounded in zip((*exact.leaves, exact.dout), (*case.leaves, case.dout), strict=True):
        leaf.data.copy_(rounded.data)
    for found, expected in zip(case.sliced(), exact.whole(), strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < limit


def test_pointwise_is_the_same_every_time() -> None:
    case = Case(4, 2, tokens=2000, width=32, device="cuda", dtype=torch.float32)
    first, second = case.sliced(), case.sliced()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_weight_gradients_that_wait_are_the_same(autocast: bool) -> None:
    torch.manual_seed(1)
    plain, split = nn.Linear(64, 96, device="cuda"), SplitLinear(64, 96, device="cuda")
    split.load_state_dict(plain.state_dict())
    queue = WeightQueue()
    attach_queue(split, queue)
    values = torch.randn(2, 128, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected, found = (layer(values).float().square().sum() for layer in (plain, split))
    expected.backward()
    with queue.collect((0, 0)):
        found.backward()
    queue.run((0, 0))
    torch.testing.assert_close(split.weight.grad, plain.weight.grad)
    torch.testing.assert_close(split.bias.grad, plain.bias.grad)


def deep(share: float) -> tuple[list[Tensor], int, SavedBytes]:
    """Six slices through eight layers: gradients, device bytes held after the last forward, what was saved."""
    torch.manual_seed(2)
    device = torch.device("cuda", torch.cuda.current_device())
    network = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(8))).to(device)
    ops, store, meter = in_turn(1, 6), one_rank_store([Layout((0, 4))]), SavedBytes(network.parameters())
    mover = pinned_mover(device, share)
    offloader = mover and Offloader(mover, ops, share, excluded=network.parameters(), meter=meter)
    inputs = [torch.randn(4096, 512, device=device) for _ in range(6)]
    before, held, outs = torch.cuda.memory_allocated(), 0, []
    for op in ops:
        if op.kind is Kind.FORWARD:
            with meter, offloader.forward(op, store) if offloader else nullcontext():
                outs.append(network(inputs[op.slice]).square().sum())
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated() - before
        else:
            if offloader:
                offloader.before_backward(op)
            outs.pop().backward()
    return [parameter.grad for parameter in network.parameters()], held, meter


def test_offload_keeps_gradients_and_frees_the_device() -> None:
    expected, held_staying, _ = deep(0.0)
    found, held_leaving, meter = deep(1.0)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    layer_bytes = 4096 * 512 * 4
    assert meter.ledger.peaks[HOST] == 4 * (1 + 8) * layer_bytes
    assert meter.live_bytes == meter.ledger.live[HOST] == 0
    assert held_staying >= 6 * 8 * layer_bytes
    assert held_leaving < 0.5 * held_staying
