"""Causal self-attention (SASRec, Kang & McAuley 2018, arXiv:1808.09781, section III-B)."""

from torch import Tensor, nn
from torch.nn import functional as F

from thresher.zoo.blocks.ragged import Grid, from_padded, to_padded


class CausalSelfAttention(nn.Module):
    """Scaled dot-product attention of each place over itself and the places before it, in ``heads`` heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.projections = nn.Linear(width, 3 * width, bias=False)

    def forward(self, values: Tensor, grid: Grid) -> Tensor:
        """[N, D] from ragged rows [N, D]."""
        padded = to_padded(self.projections(values), grid)
        query, key, value = padded.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[no-untyped-call]
        dropout = self.dropout if self.training else 0.0
        # Samples are aligned left, so causality alone keeps padding, which comes after, away from real places.
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return from_padded(mixed.transpose(1, 2).flatten(2), grid)


class Block(nn.Module):
    """One layer: x + Dropout(f(LayerNorm(x))) for attention, then for a two-layer point-wise network (III-C).

    Only attention sees padding; everything else runs on real places.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = CausalSelfAttention(width, heads, dropout)
        self.network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, values: Tensor, grid: Grid) -> Tensor:
        """[N, D] from ragged rows [N, D]."""
        values = values + self.drop(self.attention(self.norms[0](values), grid))
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
