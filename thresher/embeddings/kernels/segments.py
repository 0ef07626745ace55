"""Where the rows of a lookup occur, and sums over those places in a fixed order."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from thresher.embeddings.kernels.bags import Bags, Pooling


@dataclass(frozen=True)
class Occurrences:
    """Where the distinct rows of one table occur in a lookup.

    Attributes:
        rows: [U] int64, ascending.
        counts: [U] int64: how often each occurs.
        order: [m] int64 into the occurrences of the table (those of its features one after the other): those of the
            first row, then those of the second, and so on.
    """

    rows: Tensor
    counts: Tensor
    order: Tensor


def feature_bounds(bags: Bags) -> list[int]:
    """Where the ids of each feature start, and where the last ones end."""
    bounds: list[int] = bags.offsets[list(bags.first_bags)].tolist()
    return bounds


def features_of(bags: Bags, table: int) -> list[int]:
    """The features that read a table."""
    return [feature for feature, number in enumerate(bags.tables) if number == table]


def occurrences(bags: Bags, table: int) -> Occurrences:
    """Where the rows of a table occur."""
    bounds = feature_bounds(bags)
    ids = _joined([bags.ids[bounds[f] : bounds[f + 1]] for f in features_of(bags, table)], bags.ids).to(torch.int64)
    ordered, order = torch.sort(ids, stable=True)
    absent = int((ordered < 0).sum())
    rows, counts = torch.unique_consecutive(ordered[absent:], return_counts=True)
    return Occurrences(rows, counts, order[absent:])


def bag_numbers(bags: Bags, feature: int) -> Tensor:
    """[ids of the feature] int64: the number of each id's bag within the feature."""
    first, last = bags.first_bags[feature], bags.first_bags[feature + 1]
    lengths = bags.offsets[first + 1 : last + 1] - bags.offsets[first:last]
    return torch.repeat_interleave(torch.arange(last - first, device=lengths.device), lengths)


def inverse_lengths(bags: Bags, feature: int) -> Tensor:
    """[bags of the feature] fp32: 1 / length; 1 for empty bags."""
    first, last = bags.first_bags[feature], bags.first_bags[feature + 1]
    lengths = bags.offsets[first + 1 : last + 1] - bags.offsets[first:last]
    return 1.0 / lengths.clamp(min=1).to(torch.float32)


def coefficients(bags: Bags, feature: int) -> Tensor | None:
    """[ids of the feature] fp32: what each id's row is multiplied by in its gradient; None for ones."""
    bounds = feature_bounds(bags)
    weights = None if bags.weights is None else bags.weights[bounds[feature] : bounds[feature + 1]]
    if bags.pooling is not Pooling.MEAN:
        return weights
    inverse = inverse_lengths(bags, feature)[bag_numbers(bags, feature)]
    return inverse if weights is None else weights * inverse


def feature_views(output: Tensor, bags: Bags, dims: Sequence[int]) -> list[Tensor]:
    """For each feature its part [bags or ids, width] of an output or its gradient."""
    if bags.pooling is Pooling.NONE:
        bounds = feature_bounds(bags)
        return [output[start:end] for start, end in pairwise(bounds)]
    if bags.is_uniform:
        return list(torch.split(output, list(dims), dim=1))
    sizes = [size * dim for size, dim in zip(bags.batch, dims, strict=True)]
    parts = torch.split(output, sizes)
    return [part.view(size, dim) for part, size, dim in zip(parts, bags.batch, dims, strict=True)]


def segment_sums(values: Tensor, counts: Tensor) -> Tensor:
    """[U, D] sums of the first ``counts[0]`` rows of values [m, D], of the next ``counts[1]``, and so on.

    Torch adds up a segment from 0 in the order of its rows, each column by itself; what else it has for that
    (``index_add_``, ``sum``) runs in other orders, on CPU or on CUDA.
    """
    return torch.segment_reduce(values, "sum", lengths=counts, initial=0.0, unsafe=True)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like[:0]
