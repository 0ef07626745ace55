"""How the tokens of a microbatch are cut into slices and into sequences: the same on every rank of a pipeline."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Slices and sequences of one microbatch of ``batch`` rows, each of ``bounds[-1]`` tokens.

    Padded batches have ``starts == (0,)``: each row is one sequence, padding comes after it, and causality alone
    keeps padding away from real tokens. Packed batches have ``batch == 1`` and one entry in ``starts`` per sequence:

        tokens    a a a a a b b c c c c c        starts = (0, 5, 7)
        slices    |---0---|---1---|---2---|      bounds = (0, 4, 8, 12)

    Slice 1 holds one continuation (of a), b whole, and the beginning of c. Attention never crosses a sequence border,
    so only the first segment of a slice looks back at earlier slices.

    Attributes:
        bounds: n + 1 rising token offsets from 0; slice i holds tokens bounds[i] .. bounds[i + 1] - 1.
        batch: rows, B.
        starts: rising token offsets from 0 at which sequences begin.
        longest: tokens of the longest sequence there may be in any microbatch, by which pointwise attention divides, so
            that packing changes nothing; 0 for tokens per row.
    """

    bounds: tuple[int, ...]
    batch: int = 1
    starts: tuple[int, ...] = (0,)
    longest: int = 0

    @property
    def slices(self) -> int:
        """Number of slices, n."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """Tokens per row, S."""
        return self.bounds[-1]

    @property
    def divisor(self) -> int:
        """By which pointwise attention divides, S."""
        return self.longest or self.tokens

    def length(self, index: int) -> int:
        """Tokens per row of slice ``index``, T."""
        return self.bounds[index + 1] - self.bounds[index]

    def segments(self, index: int) -> tuple["Segment", ...]:
        """The pieces of sequences in slice ``index``, in order; only the first may have a history."""
        low, high = self.bounds[index], self.bounds[index + 1]
        edges = [*(s for s in self.starts if s < high), high]
        pairs = [(start, stop) for start, stop in pairwise(edges) if stop > low]
        return tuple(Segment(start, max(start, low) - low, stop - low) for start, stop in pairs)

    def positions(self, index: int, device: torch.device | None = None) -> Tensor:
        """[T] int64: place of each token of slice ``index`` in its own sequence, from 0."""
        low = self.bounds[index]
        parts = [torch.arange(low + s.begin, low + s.end, device=device) - s.start for s in self.segments(index)]
        return torch.cat(parts)

    @cached_property
    def is_packed(self) -> bool:
        """Whether a row holds several sequences."""
        return len(self.starts) > 1


@dataclass(frozen=True)
class Segment:
    """A piece of one sequence inside a slice.

    Attributes:
        start: token offset in the microbatch at which the sequence begins; before the slice for a continuation.
        begin, end: first token and one past the last one, counted from the beginning of the slice.
    """

    start: int
    begin: int
    end: int


def even_bounds(tokens: int, slices: int) -> tuple[int, ...]:
    """Bounds of ``slices`` slices as equal as possible, longer ones first."""
    short, longer = divmod(tokens, slices)
    return tuple(i * short + min(i, longer) for i in range(slices + 1))
