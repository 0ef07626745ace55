"""Softmax over the target and negatives drawn once per slice, with logQ correction."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.pipeline.vocabulary.arithmetic import add_rows, by_hand, gradient_of, product
from thresher.pipeline.vocabulary.head import Partial, SliceTargets
from thresher.pipeline.vocabulary.negatives import Sampler
from thresher.pipeline.vocabulary.normalised import SCALARS, NormalisedHead, Tokens


@dataclass(frozen=True)
class _Kept:
    """``drawn`` [n]: this part's negatives, from its first row; ``exponentials`` [N, 1 + n]: target, negatives."""

    tokens: Tokens
    drawn: Tensor
    peaks: Tensor
    exponentials: Tensor


class SampledSoftmaxHead(NormalisedHead):
    """loss_t = -l_t,target + log(exp(l_t,target) + sum over negatives s of exp(l_ts - log(count q_s))).

    The target is not drawn, so it is not corrected, and negatives that are the target are left out: the sum then
    estimates that of all other rows without bias (arXiv:2507.09331, section 4), and the loss tends to the full
    softmax as ``count`` grows. All tokens of a slice share its negatives. A part computes with those it owns.

    Args:
        weight: [last - first, D].
        first: its first row in the vocabulary.
        sampler: distribution q of negatives.
        count: negatives per slice.

    Raises:
        ValueError: ``count`` is not positive.
    """

    def __init__(self, weight: nn.Parameter, first: int, *, sampler: Sampler, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"{count} negatives; at least 1 is needed")
        self.weight = weight
        self.statistics = SCALARS + weight.shape[1]
        self.first, self.sampler, self.count = first, sampler, count

    def part(self, hidden: Tensor, targets: SliceTargets) -> tuple[Partial, object]:
        """See :class:`Head`."""
        with by_hand(hidden.device):
            tokens = Tokens(hidden, targets, self.first, self.first + len(self.weight))
            drawn, corrections = self._negatives(targets, tokens.weights)
            own, columns = self.weight.index_select(0, tokens.rows).to(tokens.weights.dtype), self.weight[drawn]
            positive = (own * tokens.states).sum(1, keepdim=True).masked_fill(tokens.mine == 0, -torch.inf)
            negative = product(tokens.states, columns.t(), tokens.dtype).sub_(corrections)
            negative.masked_fill_(tokens.hits(drawn), -torch.inf)
            logits = torch.cat([positive, negative], 1)
            peaks = logits.amax(1)
            exponentials = logits.sub_(torch.where(peaks == -torch.inf, 0.0, peaks).unsqueeze(1)).exp_()
            gradient = product(exponentials[:, 1:], columns, tokens.dtype).addcmul_(exponentials[:, :1], own)
            partial = tokens.partial(gradient, peaks, exponentials.sum(1), own, tokens.mine)
            return partial, _Kept(tokens, drawn, peaks, exponentials)

    def weight_gradient(self, kept: object, normaliser: Tensor) -> None:
        """See :class:`Head`."""
        assert isinstance(kept, _Kept)
        tokens = kept.tokens
        with by_hand(normaliser.device):
            gradient = gradient_of(self.weight)
            scale = tokens.weights * (kept.peaks - normaliser.flatten()).exp()
            scale = torch.where(tokens.counted, scale, 0.0)
            states = tokens.weighted(scale)
            add_rows(gradient, kept.drawn, product(kept.exponentials[:, 1:].t(), states, tokens.dtype))
            positive = tokens.weighted(scale * kept.exponentials[:, 0] - tokens.weights)
            add_rows(gradient, tokens.rows, positive * tokens.mine)

    def _negatives(self, targets: SliceTargets, like: Tensor) -> tuple[Tensor, Tensor]:
        """[n] rows that this part owns of those drawn, from its first one, and [n] log(count q)."""
        drawn = self.sampler.draw(targets.key, self.count)
        drawn = drawn[(drawn >= self.first) & (drawn < self.first + len(self.weight))]
        corrections = self.sampler.log_share(drawn) + math.log(self.count)
        return (drawn - self.first).to(like.device), corrections.to(like)
