"""Full softmax over the vocabulary, with label smoothing."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.pipeline.vocabulary.arithmetic import add_product, add_rows, by_hand, gradient_of, product
from thresher.pipeline.vocabulary.head import Partial, SliceTargets
from thresher.pipeline.vocabulary.normalised import SCALARS, NormalisedHead, Tokens


@dataclass(frozen=True)
class _Kept:
    """``exponentials`` [N, rows] of logits minus ``peaks`` [N]; None where they are to be computed again."""

    tokens: Tokens
    peaks: Tensor
    exponentials: Tensor | None


class SoftmaxHead(NormalisedHead):
    """Cross entropy: loss_t = log sum_j exp(l_tj) - (1 - e) l_t,target - e / V sum_j l_tj, with l = hidden weight^T.

    Logits are fp32 (fp64 for fp64 hidden states) and take N x rows numbers per slice from :meth:`part` to
    :meth:`weight_gradient`; or N x ``block_rows`` for a moment, at the price of computing them twice.

    Args:
        weight: [last - first, D].
        first: its first row in the vocabulary.
        vocabulary: rows of all parts, V.
        smoothing: e, 0 <= e < 1.
        block_rows: rows of which logits exist at a time; 0 for all of this part.

    Raises:
        ValueError: ``smoothing`` or ``block_rows`` out of range.
    """

    def __init__(
        self, weight: nn.Parameter, first: int, vocabulary: int, *, smoothing: float = 0.0, block_rows: int = 0
    ) -> None:
        super().__init__()
        if not (0 <= smoothing < 1 and block_rows >= 0):
            raise ValueError(f"smoothing {smoothing} and block_rows {block_rows}: 0 <= smoothing < 1, block_rows >= 0")
        self.weight = weight
        self.statistics = SCALARS + weight.shape[1]
        self.first, self.vocabulary = first, vocabulary
        self.smoothing, self.block_rows = smoothing, block_rows

    def part(self, hidden: Tensor, targets: SliceTargets) -> tuple[Partial, object]:
        """See :class:`Head`."""
        with by_hand(hidden.device):
            tokens = Tokens(hidden, targets, self.first, self.first + len(self.weight))
            gradient, exponentials = tokens.weights.new_zeros(()), None
            peaks, sums = torch.full_like(tokens.weights, -torch.inf), torch.zeros_like(tokens.weights)
            for rows in self._blocks():
                logits = product(tokens.states, rows.t(), tokens.dtype)
                top = torch.maximum(peaks, logits.amax(1))
                shrink, exponentials = (peaks - top).exp_(), logits.sub_(top.unsqueeze(1)).exp_()
                sums = sums.mul_(shrink).add_(exponentials.sum(1))
                own = product(exponentials, rows, tokens.dtype)
                gradient = own.addcmul_(gradient, shrink.unsqueeze(1)) if gradient.dim() else own
                peaks = top
            partial = tokens.partial(gradient, peaks, sums, *self._targets(tokens))
            return partial, _Kept(tokens, peaks, None if self.block_rows else exponentials)

    def weight_gradient(self, kept: object, normaliser: Tensor) -> None:
        """See :class:`Head`."""
        assert isinstance(kept, _Kept)
        tokens, total = kept.tokens, normaliser.flatten()
        with by_hand(normaliser.device):
            gradient = gradient_of(self.weight)
            if kept.exponentials is not None:
                scale = torch.where(tokens.counted, tokens.weights * (kept.peaks - total).exp(), 0.0)
                add_product(gradient, kept.exponentials.t(), tokens.weighted(scale), tokens.dtype)
            else:
                self._add_blocks(gradient, tokens, total)
            share = tokens.weights * tokens.mine.squeeze(1) * (self.smoothing - 1)
            add_rows(gradient, tokens.rows, tokens.weighted(share))
            if self.smoothing:
                states = tokens.weighted(tokens.weights).sum(0)
                gradient.sub_((states * (self.smoothing / self.vocabulary)).to(gradient.dtype))

    def _add_blocks(self, gradient: Tensor, tokens: Tokens, total: Tensor) -> None:
        states = tokens.weighted(tokens.weights)
        for rows, block in zip(self._blocks(), torch.split(gradient, self.block_rows), strict=True):
            shares = product(tokens.states, rows.t(), tokens.dtype).sub_(total.unsqueeze(1)).exp_()
            add_product(block, shares.t(), states, tokens.dtype)

    def _blocks(self) -> Iterator[Tensor]:
        return iter(torch.split(self.weight, self.block_rows or len(self.weight)))

    def _targets(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[N, D] and [N, 1]: c_r as a product."""
        rows, factors = self.weight.index_select(0, tokens.rows).to(tokens.weights.dtype), tokens.mine
        if not self.smoothing:
            return rows, factors
        rows = rows.mul_(factors * (1 - self.smoothing))
        rows += self.weight.sum(0, dtype=rows.dtype) * (self.smoothing / self.vocabulary)
        return rows, torch.ones_like(factors)
