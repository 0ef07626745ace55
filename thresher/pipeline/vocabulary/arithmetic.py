"""Sums and products without autograd: factors as narrow as they come, sums in full precision, in a fixed order."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from thresher.pipeline.vocabulary.head import wide


@contextmanager
def by_hand(device: torch.device) -> Iterator[None]:
    """Neither autograd nor autocast: gradients and precisions are chosen here."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``wide(dtype)``.

    Args:
        dtype: of hidden states. bfloat16 factors go through matrix units that add up in fp32 where the device has
            them; float16, whose range does not hold weights of tokens, is widened first.
    """
    if dtype == torch.bfloat16 and left.is_cuda:
        return torch.mm(left.to(dtype), right.to(dtype), out_dtype=torch.float32)
    return left.to(wide(dtype)) @ right.to(wide(dtype))


def add_product(total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Adds ``left @ right`` to ``total``; without a temporary of its size where precisions allow."""
    if total.dtype == left.dtype == right.dtype == dtype:
        total.addmm_(left, right)
    else:
        total.add_(product(left, right, dtype))


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds ``values`` [n, D] to the ``rows`` [n] of ``total``; the same bits on every run.

    On CPU ``index_add_`` goes through rows in order; on CUDA it does so atomically, in any order, where accumulating
    ``index_put_`` sorts first.
    """
    values = values.to(total.dtype)
    if total.is_cuda:
        total.index_put_((rows,), values, accumulate=True)
    else:
        total.index_add_(0, rows, values)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """``parameter.grad``; made of zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
