"""Metrics of sequences: how well each next token is predicted."""

import math

import numpy as np
from torch import Tensor

from thresher.trainer.metrics.exchange import Group, summed


class TokenMetrics:
    """Collects losses of tokens.

    Args:
        likelihood: losses are negative log likelihoods in nats, so that there is a perplexity.
    """

    def __init__(self, likelihood: bool) -> None:
        self._likelihood = likelihood
        self._sums = np.zeros(2)

    def update(self, loss: Tensor, weight: Tensor) -> None:
        """Adds scalars: the sum over tokens of weight times loss, and of weights."""
        self._sums += [float(loss), float(weight)]

    def compute(self, process_group: Group = None) -> dict[str, float]:
        """Collective. ``loss``, the weighted mean over the tokens of all ranks, and its exponential ``perplexity``.

        NaN without tokens.
        """
        total, weight = (float(value) for value in summed(self._sums, process_group))
        loss = total / weight if weight > 0 else math.nan
        with np.errstate(over="ignore"):
            return {"loss": loss} | ({"perplexity": float(np.exp(loss))} if self._likelihood else {})
