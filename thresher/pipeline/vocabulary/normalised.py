"""What output layers with a normaliser share: a softmax whose columns lie on several ranks.

With logits l and m_r the largest one of rank r, a part sends, per token,

    gradient     U_r = sum over its columns of exp(l_j - m_r) w_j
    statistics   m_r,  s_r = sum of exp(l_j - m_r),  t_r = <c_r, hidden>,  c_r

where c_r is the row of the target if this rank owns it, and 0 if not (label smoothing adds a little of every row). Then
M = max m_r, Z = sum of exp(m_r - M) s_r, loss = M + log Z - sum of t_r, and the gradient of the hidden state is
sum of exp(m_r - M) U_r / Z - c_r. The normaliser is M + log Z.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.pipeline.vocabulary.arithmetic import by_hand
from thresher.pipeline.vocabulary.head import Head, Merged, Partial, SliceTargets, wide

SCALARS = 3
"""Statistics per token before c_r: m_r, s_r, t_r."""


class NormalisedHead(Head):
    """A head whose parts send the statistics above."""

    def merge(self, partials: Sequence[Partial], targets: SliceTargets) -> Merged:
        """See :class:`Head`. A token of weight 0 has loss, gradient and normaliser 0, whatever its statistics are."""
        with by_hand(targets.weights.device):
            return _merge(partials, targets)


def _merge(partials: Sequence[Partial], targets: SliceTargets) -> Merged:
    peaks, sums, hits = torch.stack([p.statistics[..., :SCALARS] for p in partials]).unbind(-1)
    weights, counted = targets.weights.to(peaks.dtype), targets.weights != 0
    top = peaks.amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    shares = (peaks - top).exp()
    total = (shares * sums).sum(0)
    normaliser = torch.where(counted, top + total.log(), 0.0)
    loss = torch.where(counted, weights * (normaliser - hits.sum(0)), 0.0).sum()
    factors = torch.where(counted, weights / total, 0.0) * shares
    gradient = partials[0].gradient * factors[0].unsqueeze(-1)
    for partial, factor in zip(partials[1:], factors[1:], strict=True):
        gradient.addcmul_(partial.gradient, factor.unsqueeze(-1))
    for partial in partials:
        gradient.addcmul_(partial.statistics[..., SCALARS:], weights.unsqueeze(-1), value=-1)
    return Merged(loss, gradient, normaliser)


class Tokens:
    """The tokens of one slice, flat, as a part of the vocabulary sees them; those of weight 0 are zeros.

    Attributes:
        dtype: of the hidden states as given.
        states: [N, D] hidden states.
        weights: [N] in the wide dtype.
        counted: [N] bool, weight other than 0.
        mine: [N, 1], 1 where this part owns the target and the token counts, else 0.
        rows: [N] int64: the target counted from the part's first row; 0 where it is not mine.
    """

    def __init__(self, hidden: Tensor, targets: SliceTargets, first: int, last: int) -> None:
        self.dtype = hidden.dtype
        self.shape = hidden.shape
        self.weights = targets.weights.flatten().to(wide(hidden.dtype))
        self.counted = self.weights != 0
        self.states = torch.where(self.counted.unsqueeze(1), hidden.flatten(0, 1), 0.0)
        rows = targets.rows.flatten()
        mine = self.counted & (rows >= first) & (rows < last)
        self.rows = torch.where(mine, rows - first, 0)
        self.mine = mine.unsqueeze(1).to(self.weights.dtype)

    def weighted(self, factors: Tensor) -> Tensor:
        """[N, D] wide: states times ``factors`` [N]."""
        return self.states * factors.unsqueeze(1)

    def hits(self, rows: Tensor) -> Tensor:
        """[N, n] bool: which of ``rows`` [n] of this part are the token's target."""
        return (self.rows.unsqueeze(1) == rows) & (self.mine != 0)

    def are_targets(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """[P] bool: of pairs of a token and a row of this part, whether the row is the token's target."""
        return (self.rows[tokens] == rows) & (self.mine[tokens, 0] != 0)

    def partial(self, gradient: Tensor, peaks: Tensor, sums: Tensor, rows: Tensor, factors: Tensor) -> Partial:
        """What to send, from U_r [N, D], m_r [N], s_r [N] and c_r = rows [N, D] * factors [N, 1]."""
        statistics = gradient.new_empty(len(gradient), SCALARS + rows.shape[1])
        statistics[:, 0], statistics[:, 1] = peaks, sums
        own = torch.mul(rows, factors, out=statistics[:, SCALARS:])
        torch.sum(own * self.states, 1, out=statistics[:, 2])
        return Partial(gradient.view(self.shape), statistics.view(*self.shape[:2], -1))
