"""The order of training samples: a pure function of (seed, epoch, index), whatever the number of ranks.

Epochs follow one another without end; the cursor c counts samples consumed globally since the beginning, so
``epoch, index = divmod(c, rows)``. A global batch is the positions [c, c + G) and may straddle two epochs. Rank r of w
takes the positions p of it with ``p % w == r``: any number of ranks sees the same global batches, and resuming is
arithmetic. Each epoch is a permutation of the split:

* a split of at most ``window_rows`` rows is permuted as a whole;
* a larger one has its row groups permuted and concatenated to a stream, which is rotated by a random number of rows (so
  that every row is equally likely at every index) and cut into L equal lanes. Index i goes to lane i % L at offset
  i // L, and every lane is permuted in windows of ``window_rows // L`` rows::

      stream    [ lane 0           | lane 1           | ...          | lane L-1         | tail ]    groups permuted
      lane 0    ( window 0 )( window 1 )( window 2 )...                                             rows permuted
      indices   0, L, 2L ...  of lane 0;   1, L+1, 2L+1 ...  of lane 1

  A batch thus mixes L distant stretches, ``window_rows`` rows are in memory at a time, and where w divides L a rank
  decodes the row groups of its own lanes only. The remainder of fewer than L rows comes last.

Permutations sort the raw words of Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
with key (seed, epoch) and a counter that names the purpose, lane and window. numpy keeps raw streams of a bit generator
stable across versions (NEP 19), so an order never changes under a user.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_LANES = 64
GROUPS_PER_LANE = 8
"""Row groups a lane has at least, on average: those at its two edges are read for two lanes."""

PLAIN_WINDOW_ROWS = 1 << 16
"""Rows read at a time without shuffling, at most."""

Ints = npt.NDArray[np.int64]

_GROUPS, _ROWS, _TAIL, _ROTATION = 0, 1, 2, 3


@dataclass(frozen=True)
class Window:
    """A stretch of an epoch that is in memory at once.

    Attributes:
        stop: index behind the last one of the window.
        ranges: what to read, in order: (row group, first row, row behind the last) within the group.
        take: [n] where each wanted sample stands among the rows of ``ranges``, in the order of the samples.
    """

    stop: int
    ranges: tuple[tuple[int, int, int], ...]
    take: Ints


class Order:
    """The order of one split.

    Args:
        groups: rows of each row group, in file order.
        seed: 0 <= seed < 2**64.
        window_rows: rows permuted together.
        shuffle: False keeps the order of the files.

    Attributes:
        rows: rows of the split, the length of an epoch.
        lanes: L: a power of two, at most 64, at most the row groups that fit into a window, and few enough that a lane
            has 8 row groups.
    """

    def __init__(self, groups: Sequence[int], seed: int, window_rows: int, shuffle: bool = True) -> None:
        self._group_rows = np.asarray(groups, dtype=np.int64)
        self._seed, self._shuffle = seed, shuffle
        self.rows = int(self._group_rows.sum())
        self.whole = self.rows <= window_rows
        self.lanes = 1
        if shuffle and not self.whole:
            room = min(window_rows // int(self._group_rows.max()), len(groups) // GROUPS_PER_LANE)
            self.lanes = 1 << max(0, min(MAX_LANES, room).bit_length() - 1)
        elif not self.whole:
            window_rows = min(window_rows, PLAIN_WINDOW_ROWS)
        self._lane_rows = self.rows // self.lanes
        self._depth = min(window_rows // self.lanes, self._lane_rows)
        self._stream = (-1, 0, *self._cut(np.arange(len(self._group_rows))))

    def rows_at(self, epoch: int, index: Ints) -> Ints:
        """Row numbers of the split at the given indices of an epoch: [n] -> [n], 0 <= index < rows."""
        found = np.empty_like(index)
        left = np.arange(len(index))
        while len(left):
            first = int(index[left].min())
            window = self.window(epoch, first)
            here = index[left] < window.stop
            found[left[here]] = self.numbers(window)[window.take[index[left[here]] - first]]
            left = left[~here]
        return found

    def window(self, epoch: int, index: int, residue: int = 0, world: int = 1) -> Window:
        """The window that holds ``index``, from there on, and of it the indices i with i % world == residue."""
        split = self._lane_rows * self.lanes
        if index >= split:
            return self._tail(epoch, index, residue, world)
        number = index // (self._depth * self.lanes)
        start = number * self._depth
        depth = min(self._depth, self._lane_rows - start)
        stop = (start + depth) * self.lanes
        first = index + (residue - index) % world
        take = np.empty(len(range(first, stop, world)), dtype=np.int64)
        ranges: list[tuple[int, int, int]] = []
        # Positions that are ``period`` apart stand in the same lane, ``step`` rows apart.
        period = self.lanes // math.gcd(self.lanes, world)
        step = world * period // self.lanes
        for turn in range(min(period, len(take))):
            offset, lane = divmod(first + turn * world, self.lanes)
            ranges += self.ranges(epoch, lane * self._lane_rows + start, depth)
            inside = self._permutation(depth, epoch, _ROWS, lane, number)[offset - start :: step]
            np.add(inside[: len(take[turn::period])], turn * depth, out=take[turn::period])
        return Window(stop, tuple(ranges), take)

    def numbers(self, window: Window) -> Ints:
        """Row numbers in the split of the rows of ``window.ranges``, in that order."""
        base = np.concatenate(([0], np.cumsum(self._group_rows)))
        parts = [np.arange(base[group] + first, base[group] + last) for group, first, last in window.ranges]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _tail(self, epoch: int, index: int, residue: int, world: int) -> Window:
        start = self._lane_rows * self.lanes
        wanted = np.arange(index + (residue - index) % world, self.rows, world)
        take = self._permutation(self.rows - start, epoch, _TAIL)[wanted - start]
        ranges = self.ranges(epoch, start, self.rows - start) if len(wanted) else []
        return Window(self.rows, tuple(ranges), take)

    def _permutation(self, rows: int, epoch: int, purpose: int, lane: int = 0, window: int = 0) -> Ints:
        if not self._shuffle:
            return np.arange(rows)
        return permutation(rows, self._seed, epoch, (window, lane, purpose))

    def ranges(self, epoch: int, start: int, rows: int) -> list[tuple[int, int, int]]:
        """The stream's rows [start, start + rows) as ranges of row groups; without shuffling, the split's rows."""
        rotation, order, ends = self._stream_of(epoch)
        start = (start + rotation) % self.rows
        found = []
        at = int(np.searchsorted(ends, start, side="right"))
        while rows:
            group = int(order[at])
            first = max(0, start - int(ends[at] - self._group_rows[group]))
            last = min(first + rows, int(self._group_rows[group]))
            if last > first:
                found.append((group, first, last))
            rows, at = rows - (last - first), at + 1
            if at == len(order):
                start = at = 0
        return found

    def _stream_of(self, epoch: int) -> tuple[int, Ints, Ints]:
        """Rotation, row groups in the order of the stream, and where each ends."""
        if self.whole or not self._shuffle:
            return self._stream[1:]
        if self._stream[0] != epoch:
            order = permutation(len(self._group_rows), self._seed, epoch, (0, 0, _GROUPS))
            word = _words(1, self._seed, epoch, (0, 0, _ROTATION))[0]
            self._stream = (epoch, int(word) % self.rows, *self._cut(order))
        return self._stream[1:]

    def _cut(self, order: Ints) -> tuple[Ints, Ints]:
        return order, np.cumsum(self._group_rows[order])


def permutation(rows: int, seed: int, epoch: int, purpose: tuple[int, int, int]) -> Ints:
    """A random permutation of 0..rows - 1 that depends on the arguments only.

    Each word keeps its index in its low bits, so that words order the same way whatever the sort, ties included.
    """
    words = _words(rows, seed, epoch, purpose)
    bits = np.uint64(max(1, rows.bit_length()))
    words <<= bits
    words |= np.arange(rows, dtype=np.uint64)
    words.sort()
    words &= (np.uint64(1) << bits) - np.uint64(1)
    return words.view(np.int64)


def _words(count: int, seed: int, epoch: int, purpose: tuple[int, int, int]) -> npt.NDArray[np.uint64]:
    counter = np.array([0, *purpose], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(count)
