"""Metrics of a predicted probability: AUC, GAUC, logloss, normalised entropy, calibration."""

import numpy as np
from torch import Tensor

from thresher.trainer.metrics.counts import Counts, auc, auc_of, gauc, merged
from thresher.trainer.metrics.exchange import Floats, Group, summed
from thresher.trainer.metrics.samples import Samples, binary_labels, samples

COMPACT_AT = 1 << 20
"""Uncompacted samples that are kept before they are merged into the rest; any number gives the same result."""


class BinaryMetrics:
    """Collects logits and labels of a binary task.

    Args:
        grouped: whether samples carry a group, and GAUC is wanted. The same on all ranks.
    """

    def __init__(self, grouped: bool = False) -> None:
        self._grouped = grouped
        self._counts = Counts.empty()
        self._pending: list[Counts] = []
        self._pending_samples = 0
        self._sums = np.zeros(4)

    def update(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, group: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            logits: [B] before the sigmoid, so that large ones stay distinct; finite. AUC compares them as float32.
            labels: [B] in 0..1; a label between counts as that share of a positive.
            weight: [B], >= 0; None for 1 each.
            group: [B] int64; needed when ``grouped``.

        Raises:
            MetricError: a logit, label or weight is out of its range.
        """
        found = samples(logits, labels, weight)
        binary_labels(found)
        self._sums += _sums(found)
        groups = np.zeros(found.kept.size, np.int64)
        if self._grouped:
            assert group is not None, "grouped metrics need the group of every sample"
            groups = group.detach().cpu().numpy().astype(np.int64)[found.kept]
        positive = found.weight * found.label
        self._pending.append(Counts(groups, found.prediction, positive, found.weight - positive))
        self._pending_samples += found.kept.size
        if self._pending_samples > max(COMPACT_AT, len(self._counts)):
            self._compact()

    def compute(self, process_group: Group = None) -> dict[str, float]:
        """Collective. Metrics of all samples of all ranks.

        Returns:
            ``auc``, ``gauc`` (when grouped), ``logloss`` (natural log); ``ne``, normalised entropy: logloss over the
            entropy of the mean label (He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, 2014,
            section 3); ``calibration``: sum of probabilities over sum of labels. NaN, because undefined: ``auc`` and
            ``ne`` of one class, ``gauc`` where every group has one class, ``calibration`` without positives.
        """
        self._compact()
        result = {"auc": auc(self._counts, process_group)}
        if self._grouped:
            result["gauc"] = gauc(self._counts, process_group)
        return result | _from_sums(summed(self._sums, process_group))

    def local_auc(self) -> float:
        """AUC of this rank's samples; NaN for one class. Not collective."""
        self._compact()
        return auc_of(self._counts)

    def _compact(self) -> None:
        if self._pending:
            self._counts = merged([self._counts, *self._pending])
            self._pending, self._pending_samples = [], 0


def _sums(found: Samples) -> Floats:
    """Summed weight, weighted labels, weighted probabilities, weighted losses."""
    logits, labels = found.prediction.astype(np.float64), found.label.astype(np.float64)
    softplus = np.logaddexp(0.0, logits)
    probability = np.exp(logits - softplus)
    columns = (np.ones_like(logits), labels, probability, softplus - labels * logits)
    return np.array([np.sum(found.weight * column) for column in columns])


def _from_sums(sums: Floats) -> dict[str, float]:
    weight, labels, predicted, loss = (float(value) for value in sums)
    logloss = loss / weight if weight > 0 else float("nan")
    rate = labels / weight if weight > 0 else 0.0
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) if 0 < rate < 1 else 0.0
    return {
        "logloss": logloss,
        "ne": float(logloss / entropy) if entropy > 0 else float("nan"),
        "calibration": predicted / labels if labels > 0 else float("nan"),
    }
