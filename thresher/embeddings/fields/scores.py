"""What is known of the fields: a score each, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embeddings.fields.field import Field
from thresher.embeddings.fields.order import OutputOrder

BINS = 64
"""Parts into which the samples of a score are divided, in the order of training, to see how it varies."""


@dataclass(frozen=True)
class FieldScores:
    """F-Permutation's score of each field (SHARK, arXiv 2308.09395, section 3): what replacing its vectors by their
    mean would change of a sample's loss, to first order, in absolute value, on average over samples.

    Attributes:
        score: [F] float64; the unit is that of the loss.
        error: [F] float64, standard error of the score, NaN where too few steps were seen.
        weight: sum of the weights of the samples seen.
    """

    fields: tuple[Field, ...]
    score: Tensor
    error: Tensor
    weight: float

    def by_name(self) -> dict[str, float]:
        """Scores by the fields' names."""
        return {field.name: float(value) for field, value in zip(self.fields, self.score, strict=True)}


def scores_of(fields: Sequence[Field], sums: Tensor, weights: Tensor) -> FieldScores:
    """Scores from sums [bins, F] and the weights of the samples of each bin [bins]; empty bins are left out.

    The error is that of a mean of bins of unequal weight w: s^2 = n / (n - 1) sum w^2 (b - score)^2 / (sum w)^2. Bins
    are stretches of training, so what drifts while the model learns counts as error, too.
    """
    full = weights > 0
    sums, weights = sums[full].double(), weights[full].double()
    total = weights.sum()
    score = sums.sum(0) / total
    bins = weights.numel()
    deviations = sums - weights[:, None] * score
    variance = deviations.square().sum(0) / total.square() * (bins / (bins - 1) if bins > 1 else torch.nan)
    return FieldScores(tuple(fields), score, variance.sqrt(), float(total))


def move_products(values: Tensor, grad: Tensor, mean: Tensor, order: OutputOrder) -> Tensor:
    """[B, K]: for each sample and key sum_d grad_d (mean_d - value_d).

    Args:
        values, grad: [B, D] fp32.
        mean: [D] fp32.
    """
    moved, samples = torch.sub(mean, values).mul_(grad), values.shape[0]
    parts = [
        moved[:, run.col0 : run.col0 + run.count * run.width].view(samples, run.count, run.width).sum(2)
        for run in order.runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def merged(products: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Products [B, K] of keys added up by field: [B, n], and the fields [n]; ``of`` [K] says whose each key is."""
    fields, place = torch.unique(of, return_inverse=True)
    return products.new_zeros(products.shape[0], fields.numel()).index_add_(1, place, products), fields
