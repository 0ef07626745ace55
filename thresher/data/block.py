"""Rows in memory, column by column, between the files and the batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchrec  # noqa: F401  (registers torch.ops.fbgemm)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Ragged:
    """A list column: the values of n rows end to end.

    Attributes:
        lengths: [n] int32.
        values: [sum of lengths].
        ends: [n + 1] int64, where each row starts and ends; ``ends[0]`` is 0.
    """

    lengths: Array
    values: Array
    ends: Array

    @classmethod
    def of(cls, lengths: Array, values: Array) -> "Ragged":
        """Rows of the given lengths."""
        ends = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:])
        return cls(lengths, values, ends)

    def slice(self, start: int, stop: int) -> "Ragged":
        """Rows [start, stop), values not copied."""
        first, last = self.ends[start], self.ends[stop]
        return Ragged(self.lengths[start:stop], self.values[first:last], self.ends[start : stop + 1] - first)

    def take(self, index: Array) -> "Ragged":
        """The rows at ``index`` [m], which may repeat."""
        lengths, values, _ = torch.ops.fbgemm.permute_1D_sparse_data(
            torch.from_numpy(index.astype(np.int32)), torch.from_numpy(self.lengths), torch.from_numpy(self.values)
        )
        return Ragged.of(lengths.numpy(), values.numpy())


@dataclass(frozen=True)
class Block:
    """n rows; one array a kind of column, one line of it a column, in the order of ``columns_of``.

    Attributes:
        numbers: [n] int64, row numbers in the split.
        void: [n] bool, rows that count nowhere: bad ones, and those that fill the last batch of a sweep.
        ids: [columns of one id, n], int32 or int64.
        floats: [float columns, n] float32.
        ints: [int columns, n] int64.
        ragged: list columns by name.
    """

    numbers: Array
    void: Array
    ids: Array
    floats: Array
    ints: Array
    ragged: dict[str, Ragged]

    @property
    def rows(self) -> int:
        """n."""
        return len(self.numbers)

    def slice(self, start: int, stop: int) -> "Block":
        """Rows [start, stop), not copied."""
        return Block(
            self.numbers[start:stop],
            self.void[start:stop],
            self.ids[:, start:stop],
            self.floats[:, start:stop],
            self.ints[:, start:stop],
            {name: column.slice(start, stop) for name, column in self.ragged.items()},
        )

    def take(self, index: Array) -> "Block":
        """The rows at ``index`` [m] int64, which may repeat.

        A line of a column fits into the second-level cache, so lines are gathered one after the other.
        """
        return Block(
            self.numbers[index],
            self.void[index],
            _take(self.ids, index),
            _take(self.floats, index),
            _take(self.ints, index),
            {name: column.take(index) for name, column in self.ragged.items()},
        )

    def mended(self) -> "Block":
        """Void rows hold the values of the first row that is not void; zeros and empty lists where all are."""
        if not self.void.any():
            return self
        if self.void.all():
            empty = {
                name: Ragged.of(np.zeros_like(column.lengths), column.values[:0])
                for name, column in self.ragged.items()
            }
            lines = (np.zeros_like(self.ids), np.zeros_like(self.floats), np.zeros_like(self.ints))
            return Block(self.numbers, self.void, *lines, empty)
        filled = self.take(np.where(self.void, np.argmin(self.void), np.arange(self.rows)))
        return replace(filled, numbers=self.numbers, void=self.void)


def concat(blocks: Sequence[Block]) -> Block:
    """The rows of all blocks, one block after the other; at least one block."""
    if len(blocks) == 1:
        return blocks[0]
    ragged = {
        name: Ragged.of(
            np.concatenate([block.ragged[name].lengths for block in blocks]),
            np.concatenate([block.ragged[name].values for block in blocks]),
        )
        for name in blocks[0].ragged
    }
    return Block(
        np.concatenate([block.numbers for block in blocks]),
        np.concatenate([block.void for block in blocks]),
        np.concatenate([block.ids for block in blocks], axis=1),
        np.concatenate([block.floats for block in blocks], axis=1),
        np.concatenate([block.ints for block in blocks], axis=1),
        ragged,
    )


def _take(lines: Array, index: Array) -> Array:
    taken = np.empty((len(lines), len(index)), dtype=lines.dtype)
    for line, out in zip(lines, taken, strict=True):
        np.take(line, index, out=out, mode="clip")  # "raise" would gather into a buffer first
    return taken
