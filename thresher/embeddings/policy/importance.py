"""How much an occurrence of a row counts for its priority."""

import torch
from torch import Tensor


def sample_importance(labels: Tensor, positive_weight: float, weight: Tensor | None = None) -> Tensor:
    """[B] fp32 importance of samples: ``positive_weight`` where any label is above 0, else 1 (SHARK's alpha).

    Args:
        labels: [B], or [B, tasks]; with no task at all, no sample is positive.
        weight: [B] fp32; samples of weight 0 fill a batch up, and have no importance.
    """
    positive = labels.gt(0) if labels.dim() == 1 else labels.gt(0).any(1)
    found = torch.where(positive, positive_weight, 1.0).to(torch.float32)
    return found if weight is None else found * weight.gt(0)
