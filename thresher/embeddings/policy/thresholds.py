"""Thresholds from a byte budget: how high a row's priority must be for each tier.

One number x is sought for all tables. The threshold of a tier is x times the spread for each tier between it and the
ladder's foot, divided by the factor that the table's priorities have:

    threshold(table, tier) = x * spread^(tier - INT4) / factor(table)      DROPPED < INT4 < INT8 < FP16 < FP32

so a level means the same priority in every table, whatever other levels the table has. x is the smallest with which
all rows fit, if each is in the highest tier whose threshold its priority reaches. Priorities are known by buckets of a
histogram (``kernels/backend.py``), so thresholds lie on the buckets' lower edges; what the last bucket leaves of the
budget is then spent by lowering single thresholds by a bucket.

Hysteresis h: rows move down below ``keep_from``, the threshold, and up only above keep_from * (1 + h) / (1 - h). Where
every row with priority >= keep_from may be in the tier without exceeding the budget, the budget holds after a sweep
whatever tier a row came from.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import HISTOGRAM_BUCKETS
from thresher.embeddings.rows.tiers import Tier

LOWEST_OCTAVE = -40
PER_OCTAVE = 8
ROUNDING = 1.0 + 2.0**-20
"""A bucket is found from stat / gain, a demotion compares stat with keep_from * gain, both in fp32: raised by this much
an edge lets nothing pass that was counted below it."""
_STEPS_PER_OCTAVE = 64
_OCTAVES = 200


@dataclass(frozen=True)
class TableRows:
    """What the choice depends on, for one table.

    Attributes:
        histogram: [512] rows (over all shards, each row once) by bucket of priority; rows never updated are not in it.
        levels: tiers of the table, lowest first.
        row_bytes: bytes of a row's records in each of ``levels``, over its column shards.
        factor: the table's priorities count this many times (importance of its field).
    """

    histogram: Tensor
    levels: tuple[Tier, ...]
    row_bytes: tuple[int, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class Thresholds:
    """For one table, by number of the tier (6 values), as in ``TieredTable``; 0 and inf where there is none."""

    keep_from: tuple[float, ...]
    promote_above: tuple[float, ...]


def _edge(bucket: int) -> float:
    octave, part = divmod(bucket, PER_OCTAVE)
    return math.ldexp(1.0 + part / PER_OCTAVE, octave + LOWEST_OCTAVE)


_EDGES = (*(_edge(bucket) for bucket in range(HISTOGRAM_BUCKETS)), math.inf)


def bucket_edge(bucket: int) -> float:
    """The lowest priority in a bucket; 0 for the first, infinity beyond the last."""
    return _EDGES[bucket] if bucket else 0.0


class _Counted:
    """A table with what is needed again and again: rows above each bucket, and cost of each further level."""

    def __init__(self, table: TableRows, spread: float) -> None:
        above = torch.zeros(HISTOGRAM_BUCKETS + 1, dtype=torch.int64)
        above[:-1] = table.histogram.flip(0).cumsum(0).flip(0)
        self.above: list[int] = above.tolist()
        self.base_bytes = self.above[0] * table.row_bytes[0]
        self.extra = [high - low for low, high in pairwise(table.row_bytes)]
        self.weights = [spread ** (tier - Tier.INT4) / table.factor for tier in table.levels[1:]]

    def buckets(self, x: float) -> list[int]:
        """The first bucket of each level above the lowest."""
        return [bisect_left(_EDGES, x * weight) for weight in self.weights]

    def bytes(self, buckets: Sequence[int]) -> int:
        return self.base_bytes + sum(self.above[b] * e for b, e in zip(buckets, self.extra, strict=True))


def solve(tables: Sequence[TableRows], room_bytes: int, spread: float, hysteresis: float) -> list[Thresholds]:
    """The lowest thresholds with which records of all rows take at most ``room_bytes``.

    If not even all rows in their lowest levels fit, nothing is kept above them. A pure function of whole numbers:
    every rank comes to the same.
    """
    counted = [_Counted(table, spread) for table in tables]
    first, last = -_OCTAVES * _STEPS_PER_OCTAVE, _OCTAVES * _STEPS_PER_OCTAVE
    while first < last:
        middle = (first + last) // 2
        if sum(table.bytes(table.buckets(_grid(middle))) for table in counted) <= room_bytes:
            last = middle
        else:
            first = middle + 1
    chosen = [table.buckets(_grid(first)) for table in counted]
    _spend(counted, chosen, room_bytes)
    return [_thresholds(table, buckets, hysteresis) for table, buckets in zip(tables, chosen, strict=True)]


def _grid(step: int) -> float:
    """64 numbers to an octave, exact in every processor's arithmetic."""
    octave, part = divmod(step, _STEPS_PER_OCTAVE)
    return math.ldexp(1.0 + part / _STEPS_PER_OCTAVE, octave)


def _spend(counted: Sequence[_Counted], chosen: Sequence[list[int]], room_bytes: int) -> None:
    """Lowers single thresholds by a bucket as far as the rest of the room allows; a level stays above the one below."""
    left = room_bytes - sum(table.bytes(buckets) for table, buckets in zip(counted, chosen, strict=True))
    for table, buckets in zip(counted, chosen, strict=True):
        for level, bucket in enumerate(buckets):
            floor = buckets[level - 1] if level else 0
            cost = (table.above[bucket - 1] - table.above[bucket]) * table.extra[level]
            if bucket > floor and 0 < cost <= left:
                buckets[level] = bucket - 1
                left -= cost


def _thresholds(table: TableRows, buckets: Sequence[int], hysteresis: float) -> Thresholds:
    keep, promote = [0.0] * len(Tier), [math.inf] * len(Tier)
    for tier, bucket in zip(table.levels[1:], buckets, strict=True):
        edge = bucket_edge(bucket)
        keep[tier] = edge * ROUNDING
        promote[tier] = edge * ROUNDING * (1.0 + hysteresis) / (1.0 - hysteresis)
    return Thresholds(tuple(keep), tuple(promote))
