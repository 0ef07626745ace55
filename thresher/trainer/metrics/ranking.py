"""Metrics of the rank at which the one wanted item stands among all items."""

import numpy as np
from torch import Tensor

from thresher.errors import MetricError
from thresher.trainer.metrics.exchange import Group, summed
from thresher.trainer.metrics.samples import positive_weights


class RankingMetrics:
    """Collects ranks of targets.

    Args:
        at: the cut-offs k of ``hr@k`` and ``ndcg@k``.
    """

    def __init__(self, at: tuple[int, ...] = (10, 50)) -> None:
        self._at = at
        self._sums = np.zeros(2 + 2 * len(at))

    def update(self, ranks: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            ranks: [B], 1 is best. May be fractional (ties, see :func:`target_ranks`); infinite is a miss at any k.
            weight: [B], >= 0; None for 1 each.

        Raises:
            MetricError: a rank is below 1 or NaN, or a weight is out of its range.
        """
        weights, kept = positive_weights(weight, ranks.numel())
        places, weights = ranks.detach().reshape(-1).double().cpu().numpy()[kept], weights[kept]
        wrong = ~(places >= 1)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise MetricError(
                f"{places[first]} is no rank", where=f"sample {kept[first]} of a batch", fix="ranks are >= 1"
            )
        gain = 1 / np.log2(1 + places)
        hits = [places <= k for k in self._at]
        columns = [np.ones_like(places), 1 / places, *hits, *(hit * gain for hit in hits)]
        self._sums += [np.sum(weights * column) for column in columns]

    def compute(self, process_group: Group = None) -> dict[str, float]:
        """Collective. Weighted means over the samples of all ranks; NaN without samples.

        Returns:
            ``hr@k``: share of targets at rank <= k; ``ndcg@k``: 1 / log2(1 + rank) at rank <= k, else 0 (one relevant
            item, so the ideal gain is 1); ``mrr``: 1 / rank.
        """
        weight, *sums = (float(value) for value in summed(self._sums, process_group))
        names = ["mrr", *(f"hr@{k}" for k in self._at), *(f"ndcg@{k}" for k in self._at)]
        return {name: total / weight if weight > 0 else np.nan for name, total in zip(names, sums, strict=True)}
