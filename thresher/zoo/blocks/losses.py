"""Losses of ranked samples. Weights multiply each sample's loss; the divisor counts all samples, weight 0 included."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def full_precision(values: Tensor) -> Tensor:
    """Half precisions as float32; float32 and float64 as they are. Losses and sums of logits need the digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sample_loss(output: Tensor, label: Tensor, task: Literal["binary", "regression"]) -> Tensor:
    """[B] log loss of logits against labels 0 or 1 (natural logarithm), or squared error."""
    if task == "binary":
        return F.binary_cross_entropy_with_logits(output, label, reduction="none")
    return (output - label).square()


def weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * losses) / B, a scalar, from [B] and [B]."""
    return (losses * weight).sum() / max(losses.numel(), 1)
