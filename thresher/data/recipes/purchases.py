"""A log of purchases as arrays, and what was known of it strictly before a moment.

position  ->   0     1     2     3     4        in order of time
time           9:00  9:00  9:20  9:20  9:45
key            a     b     a     a     c

Past(key).count(a, before=2) = 1    before=4: 3    the purchase at ``before`` itself is never counted
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_DAY_S = 86400.0


@dataclass(frozen=True)
class Log:
    """N purchases in order of time. Households, products and so on are numbered from 0; -1 stands for unknown.

    Attributes:
        household, product, store, basket, week: [N].
        time: [N] seconds since 1970, ascending.
        row: [N] row numbers in the source.
        names: what the numbers of each column stand for: ``household``, ``product``, ``store``.
        attributes: [products] numbers of each product's attributes, by attribute; their meaning is in ``names``.
    """

    household: Ints
    product: Ints
    store: Ints
    basket: Ints
    week: Ints
    time: Ints
    row: Ints
    names: dict[str, pa.Array]
    attributes: dict[str, Ints]

    def start(self, time: Ints) -> Ints:
        """[n] moments to [n] positions of the first purchase at that time or later: all before it lie in the past."""
        return np.searchsorted(self.time, time, side="left").astype(np.int64)

    def named(self, column: str, numbers: Ints) -> pa.Array:
        """[n] numbers as a dictionary array of what they stand for; -1 as null."""
        return pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32), mask=numbers < 0), self.names[column])


class Past:
    """Counts of a key before a position, and when it occurred last.

    Args:
        keys: [N] number of what each purchase counts for, >= 0.
        time: [N] seconds.
    """

    def __init__(self, keys: Ints, time: Ints) -> None:
        self._time = time
        self._stride = len(keys) + 1
        self._sorted = np.sort(keys * self._stride + np.arange(len(keys)))

    def span(self, keys: Ints, before: Ints) -> tuple[Ints, Ints]:
        """[n] half-open ranges, in the order of :meth:`positions`, of the purchases of ``keys`` before positions."""
        ends = keys * self._stride + before
        order = np.argsort(ends)  # ordered look-ups stay in the cache: measured 4 times as fast
        first, last = np.empty_like(ends), np.empty_like(ends)
        first[order] = np.searchsorted(self._sorted, (keys * self._stride)[order])
        last[order] = np.searchsorted(self._sorted, ends[order])
        return first, last

    def positions(self, index: Ints) -> Ints:
        """Positions in the log of purchases ordered by key, then time."""
        return self._sorted[index] % self._stride

    def count(self, keys: Ints, before: Ints) -> Floats:
        """[n] how many purchases of ``keys`` precede positions ``before``."""
        first, end = self.span(keys, before)
        return (end - first).astype(np.float64)

    def count_and_days(self, keys: Ints, before: Ints, time: Ints) -> tuple[Floats, Floats]:
        """[n] how many, and how many days before ``time`` the last of them was (NaN for none)."""
        first, end = self.span(keys, before)
        last = self._time[self.positions(np.maximum(end - 1, 0))]
        return (end - first).astype(np.float64), np.where(end > first, (time - last) / _DAY_S, np.nan)

    def newest(self, keys: Ints, before: Ints, limit: int) -> tuple[Ints, Ints]:
        """The last ``limit`` purchases of ``keys`` before positions, oldest first.

        Returns:
            [n] lengths and [sum of lengths] positions in the log.
        """
        first, end = self.span(keys, before)
        first = np.maximum(first, end - limit)
        lengths = end - first
        offsets = np.cumsum(lengths) - lengths
        index = np.arange(int(lengths.sum())) + np.repeat(first - offsets, lengths)
        return lengths, self.positions(index)


def history(log: Log, past: Past, household: Ints, before: Ints, time: Ints, limit: int) -> dict[str, pa.Array]:
    """The columns of the feature ``history``: products, and beside them category, department and age in days."""
    lengths, positions = past.newest(household, before, limit)
    product = log.product[positions]
    age = (np.repeat(time, lengths) - log.time[positions]) / _DAY_S
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    values = {
        "history": log.named("product", product),
        "history.category": log.named("category", log.attributes["category"][product]),
        "history.department": log.named("department", log.attributes["department"][product]),
        "history.age": pa.array(np.log1p(age).astype(np.float32)),
    }
    return {key: pa.LargeListArray.from_arrays(offsets, array) for key, array in values.items()}


def spans(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``rows``."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
