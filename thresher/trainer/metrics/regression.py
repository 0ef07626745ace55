"""Metrics of a predicted value."""

import numpy as np
from torch import Tensor

from thresher.trainer.metrics.exchange import Group, summed
from thresher.trainer.metrics.samples import samples


class RegressionMetrics:
    """Collects predicted and true values."""

    def __init__(self) -> None:
        self._sums = np.zeros(3)

    def update(self, predictions: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch: [B] predictions and labels, finite; [B] weights >= 0, None for 1 each.

        Raises:
            MetricError: one of them is out of its range.
        """
        found = samples(predictions, labels, weight)
        error = found.prediction.astype(np.float64) - found.label
        self._sums += [np.sum(found.weight * column) for column in (np.ones_like(error), error**2, np.abs(error))]

    def compute(self, process_group: Group = None) -> dict[str, float]:
        """Collective. ``mse`` and ``mae``, weighted means over all ranks; NaN without samples."""
        weight, squares, absolute = (float(value) for value in summed(self._sums, process_group))
        return (
            {"mse": squares / weight, "mae": absolute / weight} if weight > 0 else dict.fromkeys(("mse", "mae"), np.nan)
        )
