"""Samples of a batch as numpy columns, checked, without those of weight 0."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from thresher.errors import MetricError
from thresher.trainer.metrics.exchange import Floats

DIVERGED = "the model diverged: lower the learning rate, set train.clip_norm, or look for extreme values in the data"


@dataclass(frozen=True)
class Samples:
    """[n] columns; ``prediction`` and ``label`` float32, ``weight`` float64 > 0, ``kept`` their places in the batch."""

    prediction: NDArray[np.float32]
    label: NDArray[np.float32]
    weight: Floats
    kept: NDArray[np.int64]


def samples(prediction: Tensor, label: Tensor, weight: Tensor | None) -> Samples:
    """Columns of the samples that count.

    Args:
        prediction, label: [B], any float type and device.
        weight: [B], >= 0; None for 1 each.

    Raises:
        MetricError: a prediction is not finite, or a weight is negative or not finite.
    """
    weights, kept = positive_weights(weight, prediction.numel())
    scores, labels = column(prediction)[kept], column(label)[kept]
    _refuse(~np.isfinite(scores), scores, kept, "prediction", DIVERGED)
    _refuse(~np.isfinite(labels), labels, kept, "label", "give every counted sample a label")
    return Samples(scores + np.float32(0), labels, weights[kept], kept)  # + 0 turns -0.0 into 0.0: the same score


def positive_weights(weight: Tensor | None, size: int) -> tuple[Floats, NDArray[np.int64]]:
    """[B] float64 weights, and the places of those that are not 0.

    Raises:
        MetricError: a weight is negative or not finite.
    """
    weights = np.ones(size) if weight is None else column(weight).astype(np.float64)
    everything = np.arange(size)
    _refuse(~(np.isfinite(weights) & (weights >= 0)), weights, everything, "weight", "weights are finite and >= 0")
    return weights, np.flatnonzero(weights)


def binary_labels(found: Samples) -> None:
    """Refuses labels outside 0..1; a label between them counts as that share of a positive.

    Raises:
        MetricError: names the first such label.
    """
    wrong = (found.label < 0) | (found.label > 1)
    _refuse(wrong, found.label, found.kept, "label", "binary labels are 0 or 1; declare 'task: regression' for others")


def column(values: Tensor) -> NDArray[np.float32]:
    """[B] float32 on the host."""
    return values.detach().reshape(-1).float().cpu().numpy()


def _refuse(
    wrong: NDArray[np.bool_], values: NDArray[np.floating], kept: NDArray[np.int64], name: str, fix: str
) -> None:
    if wrong.any():
        first = int(np.argmax(wrong))
        raise MetricError(
            f"{name} {values[first]} cannot be measured", where=f"sample {kept[first]} of a batch", fix=fix
        )
