"""Linear layers whose weight gradients may wait: the same numbers, bit for bit, and nothing kept too long."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from thresher.pipeline.runtime.meter import SavedBytes
from thresher.pipeline.runtime.weights import SplitLinear, WeightQueue, attach_queue

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["fp64", "fp32", "bf16", "autocast"],
)


def pair(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, SplitLinear]:
    torch.manual_seed(3)
    plain, split = nn.Linear(24, 40, bias).to(dtype), SplitLinear(24, 40, bias).to(dtype)
    split.load_state_dict(plain.state_dict())
    return plain, split


def slices(dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, 17, 24, generator=generator).to(dtype) for _ in range(count)]


def loss(layer: nn.Module, values: Tensor, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return layer(values).float().square().sum()


def train(layer: nn.Module, inputs: list[Tensor], autocast: bool, queue: WeightQueue | None = None) -> list[Tensor]:
    """Gradients of inputs, then of parameters, after one backward a slice."""
    leaves = [values.clone().requires_grad_() for values in inputs]
    for number, values in enumerate(leaves):
        result = loss(layer, values, autocast)
        if queue is None:
            result.backward()
        else:
            with queue.collect((0, number)):
                result.backward()
    for number in range(len(leaves) if queue is not None else 0):
        queue.run((0, number))
    return [x.grad for x in (*leaves, *layer.parameters())]


@PRECISIONS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_gradients_are_those_of_an_ordinary_layer_bit_for_bit(
    dtype: torch.dtype, autocast: bool, bias: bool, waits: bool
) -> None:
    plain, split = pair(dtype, bias)
    queue = WeightQueue() if waits else None
    attach_queue(split, queue)
    inputs = slices(dtype)
    expected, found = train(plain, inputs, autocast), train(split, inputs, autocast, queue)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 5, 24), (0, 24)])
def test_any_leading_dims(shape: tuple[int, ...]) -> None:
    plain, split = pair()
    inputs = [torch.randn(shape)]
    torch.testing.assert_close(train(plain, inputs, False), train(split, inputs, False))
    assert split(inputs[0]).shape == (*shape[:-1], 40)


def test_a_transposed_input_and_an_expanded_gradient() -> None:
    plain, split = pair()
    for layer in (plain, split):
        layer(torch.arange(96.0).view(24, 4).t()).sum().backward()
    assert torch.equal(plain.weight.grad, split.weight.grad)


def test_weights_wait_and_inputs_do_not() -> None:
    _, split = pair()
    queue = WeightQueue()
    assert attach_queue(nn.Sequential(split, nn.ReLU(), nn.Linear(40, 2)), queue) == 1
    values = slices(torch.float32)[0].requires_grad_()
    with queue.collect((1, 2)):
        loss(split, values, False).backward()
    assert values.grad is not None
    assert split.weight.grad is None
    assert split.bias.grad is None
    assert queue.bytes == 2 * 17 * (24 + 40) * 4
    queue.run((1, 2))
    assert split.weight.grad is not None
    assert queue.is_empty


def test_a_shared_input_is_held_once() -> None:
    queue = WeightQueue()
    layers = nn.ModuleList(SplitLinear(8, 8, bias=False) for _ in range(3))
    attach_queue(layers, queue)
    values = torch.randn(4, 8)
    with queue.collect((0, 0)):
        torch.stack([layer(values) for layer in layers]).square().sum().backward()
    assert queue.bytes == 4 * 8 * 4 * (1 + 3)


def test_backward_outside_collect_does_not_wait() -> None:
    _, split = pair()
    attach_queue(split, WeightQueue())
    loss(split, slices(torch.float32)[0], False).backward()
    assert split.weight.grad is not None


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_get_nothing(frozen: str) -> None:
    _, split = pair()
    split.get_parameter(frozen).requires_grad_(False)
    queue = WeightQueue()
    attach_queue(split, queue)
    with queue.collect((0, 0)):
        loss(split, slices(torch.float32)[0], False).backward()
    queue.run((0, 0))
    assert {name for name, parameter in split.named_parameters() if parameter.grad is None} == {frozen}


def test_products_are_added_in_the_order_of_backward() -> None:
    _, split = pair(bias=False)
    queue = WeightQueue()
    attach_queue(split, queue)
    inputs = [values * 10.0**power for power, values in enumerate(slices(torch.float32, 4))]
    with queue.collect((0, 0)):
        torch.stack([split(values) for values in inputs]).sum().backward()
    queue.run((0, 0))
    products = [torch.ones(34, 40).t() @ values.view(34, 24) for values in inputs]
    forwards, backwards = products[0].clone(), products[-1].clone()
    for product in products[1:]:
        forwards += product
    for product in products[-2::-1]:
        backwards += product
    assert torch.equal(split.weight.grad, backwards)
    assert not torch.equal(forwards, backwards)


def test_nothing_is_kept_after_the_run() -> None:
    _, split = pair()
    queue = WeightQueue()
    attach_queue(split, queue)
    values = slices(torch.float32)[0]
    alive = weakref.ref(values)
    with queue.collect((0, 0)):
        loss(split, values, False).backward()
    del values
    assert alive() is not None
    queue.run((0, 0))
    assert alive() is None


def test_two_backwards_under_one_key_are_a_bug() -> None:
    queue = WeightQueue()
    with queue.collect((0, 0)):
        pass
    with pytest.raises(AssertionError, match=r"\(0, 0\) are pending"), queue.collect((0, 0)):
        pass


def test_autocast_keeps_no_copy_of_the_weight() -> None:
    plain, split = pair()
    saved = {}
    for layer in (plain, split):
        meter = SavedBytes(layer.parameters())
        with meter:
            results = [loss(layer, values.requires_grad_(), True) for values in slices(torch.float32)]
        saved[layer] = meter.live_bytes
        del results
    assert saved[plain] - saved[split] == 3 * 24 * 40 * 2
