"""Attention of a target over a history (Deep Interest Network, Zhou et al. 2018, arXiv:1706.06978, section 4.3)."""

import torch
from torch import Tensor, nn

from thresher.zoo.blocks.mlp import Mlp, MlpConfig
from thresher.zoo.blocks.ragged import owners, places, segment_sum


def segment_softmax(scores: Tensor, owner: Tensor, offsets: Tensor) -> Tensor:
    """[N, 1] softmax of scores [N, 1] within each sample; ``owner`` [N] and ``offsets`` [B + 1] say whose they are."""
    if not scores.numel():
        return scores
    samples, longest = offsets.numel() - 1, int(offsets.diff().max())
    slots = owner * longest + places(owner, offsets)
    # A finite floor: in a sample without rows minus infinity would make NaN, which nothing reads but debuggers find.
    floor = torch.finfo(scores.dtype).min
    padded = scores.new_full((samples * longest, 1), floor).index_copy(0, slots, scores)
    return padded.view(samples, longest).softmax(dim=1).flatten()[slots].unsqueeze(1)


class TargetAttention(nn.Module):
    """sum_j a(e_j, t) e_j over a sample's history, a a perceptron of [t, e, t - e, t * e] (the authors' code).

    The weights a are used as they are (the paper: their sum tells the strength of interest) or after a softmax.
    Histories are ragged, so there is no padding to mask; an empty one gives zeros.
    """

    def __init__(self, width: int, config: MlpConfig, softmax: bool) -> None:
        super().__init__()
        self.unit = Mlp(4 * width, config, output=1)
        self.softmax = softmax

    def forward(self, target: Tensor, history: Tensor, lengths: Tensor, offsets: Tensor, counted: Tensor) -> Tensor:
        """[B, D] from target [B, D] and the rows of all histories [N, D].

        Args:
            lengths: [B] rows per sample; ``offsets`` [B + 1] where they start.
            counted: [B] bool, samples of positive weight: only their rows enter batch statistics.
        """
        owner = owners(lengths, history.shape[0])
        repeated = target.index_select(0, owner)
        pairs = torch.cat([repeated, history, repeated - history, repeated * history], dim=1)
        scores = self.unit(pairs, counted[owner]).to(history.dtype)
        if self.softmax:
            scores = segment_softmax(scores, owner, offsets)
        return segment_sum(scores * history, owner, lengths.numel())
