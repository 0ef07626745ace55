"""Positive and negative weight at every distinct score of every group: all that AUC and GAUC need, and no less.

Samples with the same group and score are one entry, so memory grows with the number of distinct (group, score) pairs:
28 bytes each. Exactness costs that much; float32 scores make it at most 2**32 entries a group.

       sorted by score ->   -1.5    0.2    0.2    3.1         -1.5   0.2   3.1
       labels                 0      1      0      1     ->    n=1   p=1   p=1
                                                                     n=1
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thresher.trainer.metrics.exchange import Floats, Group, exchanged, gathered, place, summed

Scores = NDArray[np.float32]
Groups = NDArray[np.int64]

SAMPLES_PER_RANK = 512
"""Scores that each rank shows the others to agree on ranges of equal size; any number gives the same AUC."""


@dataclass(frozen=True)
class Counts:
    """Weights by group and score.

    Attributes:
        group: [n] int64.
        score: [n] float32, finite.
        positive, negative: [n] float64, summed weights.
    """

    group: Groups
    score: Scores
    positive: Floats
    negative: Floats

    @staticmethod
    def empty() -> "Counts":
        return Counts(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0), np.zeros(0))

    def __len__(self) -> int:
        return self.score.size

    def compacted(self) -> "Counts":
        """Sorted by group, then score; each pair once."""
        if len(self) == 0:
            return self
        key = _sort_key(self.group, self.score)
        order = np.argsort(key)
        key = key[order]
        starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        first = order[starts]
        return Counts(
            self.group[first],
            self.score[first],
            np.add.reduceat(self.positive[order], starts),
            np.add.reduceat(self.negative[order], starts),
        )

    def ungrouped(self) -> "Counts":
        """The same samples as one group."""
        if len(self) == 0 or self.group[0] == self.group[-1]:
            return self
        return Counts(np.zeros_like(self.group), self.score, self.positive, self.negative).compacted()


def merged(parts: list[Counts]) -> Counts:
    """All parts together, compacted."""
    if not parts:
        return Counts.empty()
    group, score = np.concatenate([p.group for p in parts]), np.concatenate([p.score for p in parts])
    positive, negative = np.concatenate([p.positive for p in parts]), np.concatenate([p.negative for p in parts])
    return Counts(group, score, positive, negative).compacted()


def auc(counts: Counts, group: Group = None) -> float:
    """Collective. The probability that a positive scores above a negative, a tie counting half; NaN for one class.

    Ranks first exchange entries so that each holds one range of scores, counts the pairs within it, and adds the pairs
    of its positives with the negatives of all lower ranges: memory per rank stays at 1/world of the distinct scores.
    """
    counts = counts.ungrouped()
    if place(group)[1] > 1:
        counts = _to_owner(counts, np.searchsorted(_splitters(counts, group), counts.score, side="right"), group)
    return _auc_of_ranges(gathered(_pairs(counts), group))


def auc_of(counts: Counts) -> float:
    """AUC of this process's ``counts`` alone; NaN for one class. Not collective."""
    return _auc_of_ranges(_pairs(counts.ungrouped())[np.newaxis])


def gauc(counts: Counts, group: Group = None) -> float:
    """Collective. AUC within each group, averaged by the groups' weight (impressions); groups of one class are skipped.

    NaN where no group has both classes. Source: Zhou et al., Deep Interest Network, KDD 2018, section 6.2. Each group's
    entries travel to one rank, so a group may be split over ranks in any way.
    """
    world = place(group)[1]
    if world > 1:
        mixed = counts.group.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
        counts = _to_owner(counts, (mixed % np.uint64(world)).astype(np.int64), group)
    sums = np.zeros(2)
    if len(counts):
        pairs, positive, negative = _pairs_by_group(counts)
        both = (positive > 0) & (negative > 0)
        pairs, positive, negative = pairs[both], positive[both], negative[both]
        impressions = positive + negative
        sums = np.array([np.sum(impressions * (pairs / (positive * negative))), np.sum(impressions)])
    total, weight = summed(sums, group)
    return _ratio(float(total), float(weight))


def _pairs(counts: Counts) -> Floats:
    """Of one group: weight of correctly ordered pairs, of positives, of negatives."""
    return np.array([column[0] for column in _pairs_by_group(counts)]) if len(counts) else np.zeros(3)


def _auc_of_ranges(ranges: Floats) -> float:
    """[n, 3] pairs, positives and negatives of n ranges of scores, ascending."""
    pairs, positive, negative = ranges.T
    lower = np.cumsum(negative) - negative
    return _ratio(float(np.sum(pairs + positive * lower)), float(positive.sum() * negative.sum()))


def _pairs_by_group(counts: Counts) -> tuple[Floats, Floats, Floats]:
    """Per group: weight of correctly ordered pairs (ties half), of positives, of negatives. ``counts`` is compacted."""
    starts = np.flatnonzero(np.concatenate(([True], counts.group[1:] != counts.group[:-1])))
    sizes = np.diff(starts, append=len(counts))
    below = np.cumsum(counts.negative) - counts.negative
    below -= np.repeat(below[starts], sizes)
    pairs = counts.positive * (below + counts.negative / 2)
    positive, negative = np.add.reduceat(counts.positive, starts), np.add.reduceat(counts.negative, starts)
    return np.add.reduceat(pairs, starts), positive, negative


def _splitters(counts: Counts, group: Group) -> Floats:
    """world - 1 scores, ascending, the same on all ranks, that part all ranks' scores into ranges of similar size."""
    sample = np.full(SAMPLES_PER_RANK, np.nan)
    if len(counts):
        sample = counts.score[np.linspace(0, len(counts) - 1, SAMPLES_PER_RANK).astype(np.int64)].astype(np.float64)
    shown = gathered(sample, group)
    world = len(shown)
    scores = np.sort(shown[~np.isnan(shown)])
    return scores[np.arange(1, world) * scores.size // world] if scores.size else scores


def _to_owner(counts: Counts, owner: NDArray[np.int64], group: Group) -> Counts:
    columns = exchanged([counts.group, counts.score, counts.positive, counts.negative], owner, group)
    return Counts(*columns).compacted()  # type: ignore[arg-type]


def _sort_key(group: Groups, score: Scores) -> NDArray[np.uint32] | NDArray[np.uint64]:
    """One unsigned integer a pair, in the order of (group, score)."""
    bits = score.view(np.uint32)
    # IEEE floats order like integers once the sign bit of positives, or all bits of negatives, are flipped.
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    low, high = int(group.min()), int(group.max())
    if low == high:
        return ordered
    numbers = group - low if high - low < 1 << 32 else np.unique(group, return_inverse=True)[1]
    return numbers.astype(np.uint64) << np.uint64(32) | ordered


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
