"""Causal self-attention (SASRec, Kang & McAuley 2018, arXiv:1808.09781, section III-B)."""

from torch import Tensor, nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    """Scaled dot-product attention of each place over itself and the places before it, in ``heads`` heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.projections = nn.Linear(width, 3 * width, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """[B, L, D] from [B, L, D]."""
        parts = self.projections(values).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        # Samples are aligned left, so causality alone keeps padding, which comes after, away from real places.
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """One layer: x + Dropout(f(LayerNorm(x))) for attention, then for a two-layer point-wise network (III-C)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = CausalSelfAttention(width, heads, dropout)
        self.network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        """[B, L, D] from [B, L, D]."""
        values = values + self.drop(self.attention(self.norms[0](values)))
        output: Tensor = values + self.drop(self.network(self.norms[1](values)))
        return output


class AgePositions(nn.Module):
    """A learned vector for each place, counted back from the newest: as in the paper, which pads on the left.

                 oldest .. newest
    sample 0       2    1    0
    sample 1            1    0     in a batch aligned left: 1 0 and padding
    """

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(places, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, lengths: Tensor, owner: Tensor, place: Tensor) -> Tensor:
        """[N, D] for rows owned by samples ``owner`` [N] at ``place`` [N] from the oldest; ``lengths`` [B]."""
        ages = lengths[owner] - 1 - place
        vectors: Tensor = self.table(ages)
        return vectors
