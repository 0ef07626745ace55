"""Negatives: rows drawn as a pure function of (seed, step, microbatch, slice), alike on every rank and device."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from thresher.embeddings.rows.generator import row_keys, table_key

Key = tuple[int, int, int, int]
"""(seed, step, microbatch, slice)."""


class Sampler(ABC):
    """A distribution q over rows of a vocabulary, from which negatives are drawn independently, with replacement."""

    @abstractmethod
    def log_share(self, rows: Tensor) -> Tensor:
        """[n] float64 log q of rows [n] int64 that can be drawn."""

    @abstractmethod
    def _at(self, quantiles: Tensor) -> Tensor:
        """[n] int64 rows at quantiles [n] float64, 0 <= quantile < 1."""

    def draw(self, key: Key, count: int) -> Tensor:
        """[count] int64 rows, on CPU."""
        seed, step, microbatch, index = key
        stream = table_key(seed, f"negatives/{microbatch}/{index}")
        bits = row_keys(stream, torch.arange(count), step)
        return self._at((bits >> 11 & (1 << 53) - 1).to(torch.float64) * 2.0**-53)


class Uniform(Sampler):
    """Every row first .. last - 1 alike.

    Raises:
        ValueError: there is no such row.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.count = _range(first, last)

    def log_share(self, rows: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return torch.full(rows.shape, -math.log(self.count), dtype=torch.float64, device=rows.device)

    def _at(self, quantiles: Tensor) -> Tensor:
        return self.first + (quantiles * self.count).long()


class LogUniform(Sampler):
    """Zipf-like, for rows first .. last - 1 in falling frequency: q of the k-th is log((k + 2) / (k + 1)) / log(n + 1).

    Raises:
        ValueError: there is no such row.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.count = _range(first, last)

    def log_share(self, rows: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        places = (rows - self.first).to(torch.float64)
        return (1 / (places + 1)).log1p().log() - math.log(math.log(self.count + 1))

    def _at(self, quantiles: Tensor) -> Tensor:
        places = (quantiles * math.log(self.count + 1)).exp().long() - 1
        return self.first + places.clamp(0, self.count - 1)


class Frequencies(Sampler):
    """In proportion to ``counts`` [V], none negative, of all rows; those of count 0 are never drawn.

    Raises:
        ValueError: a count is negative or no number, or all are 0.
    """

    def __init__(self, counts: Tensor) -> None:
        counts = counts.to("cpu", torch.float64)
        if not (counts >= 0).all() or not 0 < float(counts.sum()) < math.inf:
            raise ValueError("counts of rows must be finite, not negative, and not all 0")
        self._rows = counts.nonzero().squeeze(1)
        self._log_shares = (counts / counts.sum()).log()
        self._ends = counts[self._rows].cumsum(0)

    def log_share(self, rows: Tensor) -> Tensor:
        """See :class:`Sampler`."""
        return self._log_shares.to(rows.device)[rows]

    def _at(self, quantiles: Tensor) -> Tensor:
        places = torch.searchsorted(self._ends, quantiles * self._ends[-1], right=True)
        return self._rows[places.clamp(max=len(self._rows) - 1)]


def _range(first: int, last: int) -> tuple[int, int]:
    if not 0 <= first < last:
        raise ValueError(f"no rows {first}..{last - 1} to draw from")
    return first, last - first
