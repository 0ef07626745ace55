"""What the runtime asks of an output layer: its loss and gradients from parts that each hold some of its rows.

One slice at a time, with one exchange of messages (the idea of arXiv:2411.05288, section 4: leave the normaliser open
and scale afterwards):

    every rank r    part:   logits over its rows -> unnormalised gradient of the hidden state, statistics
    last rank       merge:  statistics of all ranks -> loss, gradient of the hidden state, normaliser
    every rank r    weight_gradient:  normaliser -> gradient of its rows

A head that is not cut is the same with a single part. What is exchanged is of dtype :func:`wide` of the hidden states.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """Precision of all that heads exchange, for hidden states of ``dtype``: float32 for halves, else their own."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class SliceTargets:
    """What the tokens of one slice should predict.

    Attributes:
        rows: [B, T] int64.
        weights: [B, T] float, divided already by the weight of the whole step, so that losses of slices add up.
        key: (seed, step, microbatch, slice): all that sampled negatives may depend on.
    """

    rows: Tensor
    weights: Tensor
    key: tuple[int, int, int, int]


@dataclass(frozen=True)
class Partial:
    """What a part sends to the last rank.

    Attributes:
        gradient: [B, T, D] wide: gradient of the hidden state as far as this part knows it.
        statistics: [B, T, s] wide.
    """

    gradient: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class Merged:
    """What the last rank makes of all parts.

    Attributes:
        loss: scalar, wide: sum over the slice of weight times loss.
        gradient: [B, T, D] wide: of the hidden state.
        normaliser: [B, T] wide: what parts need for the gradients of their rows.
    """

    loss: Tensor
    gradient: Tensor
    normaliser: Tensor


class Head(nn.Module, ABC):
    """Rows first .. last - 1 of an output layer of ``vocabulary`` rows, and the loss.

    Nothing here runs under autograd: gradients of ``weight`` are added to ``weight.grad`` by :meth:`weight_gradient`.

    Attributes:
        weight: [last - first, D] parameter.
        statistics: numbers per token in :class:`Partial`.
    """

    weight: nn.Parameter
    statistics: int

    @abstractmethod
    def part(self, hidden: Tensor, targets: SliceTargets) -> tuple[Partial, object]:
        """What to send, and what to keep for :meth:`weight_gradient`; ``hidden`` is [B, T, D]."""

    @abstractmethod
    def merge(self, partials: Sequence[Partial], targets: SliceTargets) -> Merged:
        """From the partials of all ranks, in order of rank. On the last rank."""

    @abstractmethod
    def weight_gradient(self, kept: object, normaliser: Tensor) -> None:
        """Adds this slice's gradient to ``weight.grad``."""
