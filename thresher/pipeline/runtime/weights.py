"""Linear layers whose weight gradients may be computed later than their input gradients.

In the drain of a pipeline a rank waits for gradients of its neighbours. INPUT_BACKWARD computes only what the previous
stage waits for and leaves the weights' matrix products to WEIGHT_BACKWARD, which fills the wait (zero bubble,
arXiv:2401.10241, section 2). Only matrices are worth deferring: norms and biases by distance stay in INPUT_BACKWARD.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class _Product:
    """The gradient of a layer's weight, not yet computed: gradient^T values, flattened to [tokens, *]."""

    layer: "SplitLinear"
    values: Tensor
    gradient: Tensor


class WeightQueue:
    """Weight gradients that are put off, by (microbatch, slice). One queue per chunk."""

    def __init__(self) -> None:
        self._pending: dict[tuple[int, int], deque[_Product]] = {}
        self._key: tuple[int, int] | None = None

    @property
    def is_collecting(self) -> bool:
        """Whether backward puts weight gradients off now."""
        return self._key is not None

    @property
    def is_empty(self) -> bool:
        """Whether every weight gradient that was put off has been computed."""
        return not self._pending

    @property
    def bytes(self) -> int:
        """What pending products hold, each storage once."""
        held = (t.untyped_storage() for products in self._pending.values() for p in products for t in _tensors(p))
        return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())

    @contextmanager
    def collect(self, key: tuple[int, int]) -> Iterator[None]:
        """Backward inside this context puts weight gradients off under ``key``."""
        assert key not in self._pending, f"weight gradients of {key} are pending already"
        assert self._key is None, f"weight gradients of {self._key} are being collected"
        self._key, self._pending[key] = key, deque()
        try:
            yield
        finally:
            self._key = None

    def add(self, product: _Product) -> None:
        """Puts off one product under the key of :meth:`collect`."""
        assert self._key is not None
        self._pending[self._key].append(product)

    @torch.no_grad()
    def run(self, key: tuple[int, int]) -> None:
        """Adds what was put off under ``key`` to ``.grad``, in the order it was put off, and forgets it."""
        products = self._pending.pop(key)
        while products:
            _accumulate(products.popleft())


class SplitLinear(nn.Linear):
    """``nn.Linear`` whose backward can leave the weight's gradient to a :class:`WeightQueue`.

    Same arithmetic, bit for bit, also under autocast. There it keeps the weight itself for backward and not, as
    ``F.linear`` would, a copy in the lower precision: each slice has an autocast region of its own, hence would keep a
    copy of its own.

    Attributes:
        queue: where gradients are put off while it collects; None: backward computes everything at once.
    """

    queue: WeightQueue | None = None

    def forward(self, values: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        output: Tensor = _Linear.apply(_lowered(values), self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return output


def attach_queue(module: nn.Module, queue: WeightQueue | None) -> int:
    """Sets the queue of every :class:`SplitLinear` in ``module``; how many there are."""
    layers = [layer for layer in module.modules() if isinstance(layer, SplitLinear)]
    for layer in layers:
        layer.queue = queue
    return len(layers)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, weight: Tensor, bias: Tensor | None, layer: SplitLinear) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.layer = layer  # type: ignore[attr-defined]
        with torch.autocast(values.device.type, enabled=False):
            return F.linear(values, weight.to(values.dtype), None if bias is None else bias.to(values.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        values, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        layer: SplitLinear = ctx.layer  # type: ignore[attr-defined]
        wants_values, wants_weight, wants_bias, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
        with torch.autocast(gradient.device.type, enabled=False):
            flat = gradient.reshape(-1, gradient.shape[-1])
            back = flat.mm(weight.to(flat.dtype)).view(values.shape) if wants_values else None
            if not (wants_weight or wants_bias):
                return back, None, None, None
            product = _Product(layer, values.reshape(-1, values.shape[-1]), flat)
            if layer.queue is not None and layer.queue.is_collecting:
                layer.queue.add(product)
                return back, None, None, None
            return back, *_gradients(product, wants_weight, wants_bias), None


def _gradients(product: _Product, weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, in the dtype of the parameters; None for what is not wanted."""
    layer = product.layer
    of_weight = product.gradient.t().mm(product.values).to(layer.weight.dtype) if weight else None
    of_bias = product.gradient.sum(0).to(layer.bias.dtype) if bias else None
    return of_weight, of_bias


def _accumulate(product: _Product) -> None:
    layer = product.layer
    has_bias = layer.bias is not None and layer.bias.requires_grad
    gradients = _gradients(product, layer.weight.requires_grad, has_bias)
    for parameter, gradient in zip((layer.weight, layer.bias), gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient


def _lowered(values: Tensor) -> Tensor:
    """``values`` as ``F.linear`` would take them under the autocast that is on, if any; fp64 is left alone."""
    kind = values.device.type
    if torch.is_autocast_enabled(kind) and values.dtype != torch.float64:
        return values.to(torch.get_autocast_dtype(kind))
    return values


def _tensors(product: _Product) -> tuple[Tensor, Tensor]:
    return product.values, product.gradient
