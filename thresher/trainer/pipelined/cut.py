"""From the samples of a step to the microbatches and slices of a pipeline.

samples  a a a .     padded  [a a a .]     packed  [a a a b d d]
         b . . .             [b . . .]
         . . . .             [. . . .]
         d d . .             [d d . .]
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.microbatch import Microbatch


class Cut(NamedTuple):
    """Samples as microbatches.

    Attributes:
        firsts: [B] int64: of each sample, its first token among those of all microbatches, row by row.
    """

    microbatches: list[Microbatch]
    firsts: Tensor


class Cutter(ABC):
    """One way to cut samples into microbatches and slices."""

    @abstractmethod
    def cut(self, samples: Microbatch, lengths: Tensor) -> Cut:
        """All of ``samples``.

        Args:
            samples: padded to one length, in one slice.
            lengths: [B] int64, tokens of each; below 1 where there are none.
        """


@dataclass(frozen=True)
class PaddedCutter(Cutter):
    """Equal numbers of rows, in order, with their padding.

    Attributes:
        microbatches: of which the number of samples is a multiple.
        bounds: of the slices of a sequence.
    """

    microbatches: int
    bounds: tuple[int, ...]

    def cut(self, samples: Microbatch, lengths: Tensor) -> Cut:
        """See :class:`Cutter`."""
        rows, rest = divmod(samples.layout.batch, self.microbatches)
        assert not rest, f"{samples.layout.batch} samples are no multiple of {self.microbatches} microbatches"
        layout = Layout(self.bounds, rows)
        firsts = torch.arange(samples.layout.batch, device=lengths.device) * layout.tokens
        parts = [slice(first, first + rows) for first in range(0, samples.layout.batch, rows)]
        return Cut([_rows(samples, layout, part) for part in parts], firsts)


def _rows(samples: Microbatch, layout: Layout, rows: slice) -> Microbatch:
    times = None if samples.times is None else samples.times[rows]
    inputs, targets, weights = samples.inputs[rows], samples.targets[rows], samples.weights[rows]
    return replace(samples, layout=layout, inputs=inputs, targets=targets, weights=weights, times=times)


@dataclass(frozen=True)
class PackedCutter(Cutter):
    """About equal numbers of tokens, without padding; samples without tokens are left out.

    A microbatch of fewer tokens than slices is filled up with tokens of weight 0, each a sequence of its own.

    Attributes:
        microbatches: how many.
        slices: of a microbatch.
        per_pair: work on a pair of tokens in attention, over all other work on a token, for slices of equal work; 0 for
            slices of equally many tokens.
    """

    microbatches: int
    slices: int
    per_pair: float

    def cut(self, samples: Microbatch, lengths: Tensor) -> Cut:
        """See :class:`Cutter`."""
        counts = [max(count, 0) for count in lengths.tolist()]
        firsts, before, found = [0] * len(counts), 0, []
        for rows in _dealt(counts, self.microbatches):
            microbatch = self._packed(samples, {row: counts[row] for row in rows})
            for row, start in zip(rows, microbatch.layout.starts, strict=False):
                firsts[row] = before + start
            before += microbatch.layout.tokens
            found.append(microbatch)
        return Cut(found, torch.tensor(firsts, device=lengths.device))

    def _packed(self, samples: Microbatch, counts: dict[int, int]) -> Microbatch:
        width, device = samples.layout.tokens, samples.inputs.device
        missing = max(self.slices - sum(counts.values()), 0)
        lengths = [*counts.values(), *[1] * missing]
        starts = tuple(accumulate(lengths[:-1], initial=0))
        places = [torch.arange(row * width, row * width + count) for row, count in counts.items()]
        index = torch.cat([torch.empty(0, dtype=torch.int64), *places]).to(device)

        def of(values: Tensor) -> Tensor:
            return F.pad(values.flatten()[index], (0, missing)).unsqueeze(0)

        layout = Layout(self._bounds(lengths), 1, starts, longest=width)
        times = None if samples.times is None else of(samples.times)
        return Microbatch(layout, of(samples.inputs), of(samples.targets), of(samples.weights), times)

    def _bounds(self, lengths: Sequence[int]) -> tuple[int, ...]:
        tokens = sum(lengths)
        if not self.per_pair:
            return even_bounds(tokens, self.slices)
        places = torch.cat([torch.arange(1, length + 1, dtype=torch.float64) for length in lengths])
        spent = torch.cumsum(1 + self.per_pair * places, 0)
        wanted = spent[-1] * torch.arange(1, self.slices) / self.slices
        bounds = [0]
        for number, bound in enumerate(torch.searchsorted(spent, wanted).tolist(), start=1):
            bounds.append(min(max(bound, bounds[-1] + 1), tokens - self.slices + number))
        return (*bounds, tokens)


def _dealt(counts: Sequence[int], parts: int) -> list[list[int]]:
    """Rows with tokens by part, in order: the longest first, each to the part that has the fewest tokens so far."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    heapify(loads)
    for row in sorted(range(len(counts)), key=lambda row: -counts[row]):
        if counts[row]:
            load, part = loads[0]
            dealt[part].append(row)
            heapreplace(loads, (load + counts[row], part))
    return [sorted(rows) for rows in dealt]
