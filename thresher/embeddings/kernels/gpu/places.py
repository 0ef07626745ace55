"""Where bags and ids of a lookup are: tensors that kernels walk over, made on the device without waiting for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.kernels.bags import Bags, Pooling


@dataclass(frozen=True)
class Places:
    """Bags of a lookup, or its ids where each has an output of its own (pooling ``NONE``).

    Attributes:
        table: [bags] int32, the table each reads.
        output: [bags] int64, where in the output (and its gradient) its vector starts, in numbers.
        sample: [bags] int32, its number within its feature.
        bag: [n] int64, which of them each id belongs to.
        starts: [bags + 1] int64, its first id.
        shape: of the output.
    """

    table: Tensor
    output: Tensor
    sample: Tensor
    bag: Tensor
    starts: Tensor
    shape: tuple[int, ...]


def places_of(tables: Sequence[Table], bags: Bags) -> Places:
    """The places of a lookup. Offsets may be out of order: numbers are wrong then, but never beyond the tensors."""
    device, n = bags.ids.device, bags.ids.numel()
    dims = [tables[number].dim for number in bags.tables]
    sizes = torch.tensor(bags.batch, device=device)
    features = torch.arange(len(dims), device=device)
    feature = torch.repeat_interleave(features, sizes, output_size=bags.first_bags[-1])
    sample = torch.arange(bags.first_bags[-1], device=device) - torch.tensor(bags.first_bags, device=device)[feature]
    table = torch.tensor(bags.tables, dtype=torch.int32, device=device)[feature]
    ids = torch.arange(n, device=device)
    bag = torch.searchsorted(bags.offsets[1:], ids, right=True).clamp(max=max(len(table) - 1, 0))
    if bags.pooling is Pooling.NONE:
        starts = torch.arange(n + 1, device=device)
        return Places(table[bag], ids * dims[0], sample[bag].int(), ids, starts, (n, dims[0]))
    bases, strides, shape = _columns(bags, dims)
    output = torch.tensor(bases, device=device)[feature] + sample * torch.tensor(strides, device=device)[feature]
    return Places(table, output, sample.int(), bag, bags.offsets, shape)


def _columns(bags: Bags, dims: Sequence[int]) -> tuple[list[int], list[int], tuple[int, ...]]:
    """Where the output of each feature starts, from one bag's to the next one's, and the output's shape."""
    bases, total = [], 0
    if bags.is_uniform:
        for dim in dims:
            bases.append(total)
            total += dim
        return bases, [total] * len(dims), (bags.batch[0] if bags.batch else 0, total)
    for dim, size in zip(dims, bags.batch, strict=True):
        bases.append(total)
        total += dim * size
    return bases, list(dims), (total,)
