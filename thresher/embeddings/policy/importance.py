"""How much an occurrence of a row counts for its priority."""

import torch
from torch import Tensor


def sample_importance(labels: Tensor, positive_weight: float) -> Tensor:
    """[B] fp32 weights of samples: ``positive_weight`` where any label is above 0, else 1 (SHARK's alpha).

    Args:
        labels: [B], or [B, tasks].
    """
    positive = labels.view(labels.shape[0], -1).gt(0).any(1)
    return torch.where(positive, positive_weight, 1.0).to(torch.float32)
