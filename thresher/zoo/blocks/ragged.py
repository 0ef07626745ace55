"""Operations on ragged rows: values [N, D] of B samples, sample b owning rows offsets[b] .. offsets[b+1] - 1.

sample ->   0        1     2
values   [a b c]   [ ]   [d]      lengths 3 0 1    offsets 0 3 3 4    owner 0 0 0 2
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def owners(lengths: Tensor, total: int) -> Tensor:
    """[N] int64: the sample that owns each row, from [B] lengths whose sum is ``total``."""
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths, output_size=total)


def places(owner: Tensor, offsets: Tensor) -> Tensor:
    """[N] int64: each row's place within its sample, counted from 0."""
    return torch.arange(owner.numel(), device=owner.device) - offsets[owner]


def segment_sum(values: Tensor, owner: Tensor, samples: int) -> Tensor:
    """[B, D] sums over each sample's rows, from [N, D] values and their owners [N]; zeros where there are none.

    On CPUs rows are added in their order, so the result is the same in every run; ``index_add`` there takes half the
    time of ``segment_reduce``.
    """
    return values.new_zeros(samples, values.shape[1]).index_add(0, owner, values)


def first_or_zero(values: Tensor, offsets: Tensor) -> Tensor:
    """[B, D] first row of each sample, zeros where it has none.

    Samples with exactly one row each, the usual case, get ``values`` itself.
    """
    starts, ends = offsets[:-1], offsets[1:]
    present = ends > starts
    if values.shape[0] == present.numel() and bool(present.all()):
        return values
    chosen = values.index_select(0, starts[present])
    return values.new_zeros(present.numel(), values.shape[1]).index_copy(0, present.nonzero().squeeze(1), chosen)


@dataclass(frozen=True)
class Grid:
    """The padded form of ragged rows: row i stands in slot ``slots[i]`` = sample * length + place.

    Attributes:
        slots: [N] int64.
        length: of the longest sample, at least 1.
    """

    slots: Tensor
    samples: int
    length: int


def to_padded(values: Tensor, grid: Grid) -> Tensor:
    """[samples, length, D] from values [N, D], zeros in slots without a row.

    FBGEMM's ``jagged_to_padded_dense`` does the same but knows no float64 on CPUs.
    """
    flat = values.new_zeros(grid.samples * grid.length, values.shape[1]).index_copy(0, grid.slots, values)
    return flat.view(grid.samples, grid.length, values.shape[1])


def from_padded(padded: Tensor, grid: Grid) -> Tensor:
    """The inverse of :func:`to_padded`: [N, D]."""
    return padded.flatten(0, 1).index_select(0, grid.slots)


def newest(values: Tensor, lengths: Tensor, offsets: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The last ``limit`` entries of each sample: values [N'] and lengths [B]."""
    owner = owners(lengths, values.numel())
    from_end = offsets[owner + 1] - torch.arange(values.numel(), device=values.device)
    return values[from_end <= limit], lengths.clamp(max=limit)
