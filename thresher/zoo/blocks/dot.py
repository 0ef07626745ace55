"""Pairwise inner products of vectors (DLRM, Naumov et al. 2019, arXiv:1906.00091, section 2.1.3)."""

import torch
from torch import Tensor, nn


class DotInteraction(nn.Module):
    """The inner products <v_i, v_j> of ``count`` vectors, i > j, and i = j too with ``itself``.

    Attributes:
        width: number of pairs.
    """

    def __init__(self, count: int, itself: bool, device: torch.device) -> None:
        super().__init__()
        row, column = torch.tril_indices(count, count, offset=0 if itself else -1, device=device)
        self.pairs: Tensor
        self.register_buffer("pairs", row * count + column, persistent=False)
        self.width = row.numel()

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, pairs] from [B, count, D]."""
        # index_select: its gradient is 2.5 times faster on CPUs than that of indexing with two tensors.
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
