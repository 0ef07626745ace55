"""Log loss of the target against negatives drawn for each token (SASRec, arXiv:1808.09781)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.pipeline.vocabulary.arithmetic import add_rows, by_hand, gradient_of
from thresher.pipeline.vocabulary.head import Head, Merged, Partial, SliceTargets
from thresher.pipeline.vocabulary.negatives import Sampler
from thresher.pipeline.vocabulary.normalised import Tokens


@dataclass(frozen=True)
class _Kept:
    """Of P pairs of a token and a negative, and of the N targets: derivatives of the loss by the logit."""

    tokens: Tokens
    token: Tensor
    drawn: Tensor
    negative: Tensor
    positive: Tensor


class BinaryHead(Head):
    """loss_t = softplus(-l_t,target) + sum over k negatives s of the token of softplus(l_ts).

    A negative that is the target is left out. A part computes with the targets and negatives it owns; nothing needs a
    normaliser, so that of :class:`Merged` is 0.

    Args:
        weight: [last - first, D].
        first: its first row in the vocabulary.
        sampler: distribution of negatives.
        count: negatives per token, k.

    Raises:
        ValueError: ``count`` is not positive.
    """

    def __init__(self, weight: nn.Parameter, first: int, *, sampler: Sampler, count: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"{count} negatives; at least 1 is needed")
        self.weight = weight
        self.statistics = 1
        self.first, self.sampler, self.count = first, sampler, count

    def part(self, hidden: Tensor, targets: SliceTargets) -> tuple[Partial, object]:
        """See :class:`Head`. The statistic is the part's loss."""
        with by_hand(hidden.device):
            tokens = Tokens(hidden, targets, self.first, self.first + len(self.weight))
            wide, mine = tokens.weights.dtype, tokens.mine.squeeze(1)
            token, drawn = self._pairs(targets, hidden.device)
            kept = (tokens.counted[token] & ~tokens.are_targets(token, drawn)).to(wide)
            own, rows = self.weight[tokens.rows].to(wide), self.weight[drawn].to(wide)
            positive = (own * tokens.states).sum(1)
            negative = (rows * tokens.states[token]).sum(1)
            losses = F.softplus(-positive) * mine
            add_rows(losses, token, F.softplus(negative) * kept)
            by_positive, by_negative = -torch.sigmoid(-positive) * mine, torch.sigmoid(negative) * kept
            gradient = own * by_positive.unsqueeze(1)
            add_rows(gradient, token, rows * by_negative.unsqueeze(1))
            partial = Partial(gradient.view(hidden.shape), losses.view(*hidden.shape[:2], 1))
            return partial, _Kept(tokens, token, drawn, by_negative, by_positive)

    def merge(self, partials: Sequence[Partial], targets: SliceTargets) -> Merged:
        """See :class:`Head`."""
        with by_hand(targets.weights.device):
            losses, gradient = partials[0].statistics, partials[0].gradient
            for partial in partials[1:]:
                losses, gradient = losses + partial.statistics, gradient + partial.gradient
            weights = targets.weights.to(losses.dtype).unsqueeze(-1)
            return Merged((losses * weights).sum(), gradient * weights, torch.zeros_like(weights.squeeze(-1)))

    def weight_gradient(self, kept: object, normaliser: Tensor) -> None:
        """See :class:`Head`."""
        assert isinstance(kept, _Kept)
        tokens = kept.tokens
        with by_hand(normaliser.device):
            gradient, states = gradient_of(self.weight), tokens.weighted(tokens.weights)
            add_rows(gradient, kept.drawn, states[kept.token] * kept.negative.unsqueeze(1))
            add_rows(gradient, tokens.rows, states * kept.positive.unsqueeze(1))

    def _pairs(self, targets: SliceTargets, device: torch.device) -> tuple[Tensor, Tensor]:
        """[P] tokens and [P] negatives, from this part's first row, of the pairs whose negative it owns."""
        drawn = self.sampler.draw(targets.key, targets.rows.numel() * self.count) - self.first
        place = ((drawn >= 0) & (drawn < len(self.weight))).nonzero().squeeze(1)
        return (place // self.count).to(device), drawn[place].to(device)
