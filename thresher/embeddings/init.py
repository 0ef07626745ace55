"""Initial weights of tables: a pure function of (seed, table, row, column).

A rank fills only the rectangles it owns, and gets the same numbers whatever the sharding type, the number of ranks
or the order of filling. Numbers come from Philox, a counter-based generator (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011): the key is a hash of (seed, table), the counter is the number of a block of rows.
"""

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thresher.embeddings.tables import table_weights

BLOCK_ROWS = 1024
"""Rows drawn from one counter. Part of the definition of the numbers: another value gives other weights."""


def init_scale(rows: int, given: float = 0.0) -> float:
    """The bound s of the uniform distribution on [-s, s): ``given``, or 1/sqrt(rows) (TorchRec's) where that is 0."""
    return given or 1.0 / math.sqrt(rows)


def init_key(seed: int, table: str) -> int:
    """The 128-bit key of a table's generator; kernels that draw initial values themselves need it."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{table}".encode(), digest_size=16).digest(), "little")


def initial_rows(seed: int, table: str, row0: int, rows: int, dim: int, scale: float) -> NDArray[np.float32]:
    """Rows ``row0`` to ``row0 + rows`` of ``table``: [rows, dim] float32, uniform on [-scale, scale)."""
    first = row0 // BLOCK_ROWS
    last = -(-(row0 + rows) // BLOCK_ROWS)
    key = init_key(seed, table)
    blocks = [_block(key, number, dim, scale) for number in range(first, last)]
    skip = row0 - first * BLOCK_ROWS
    return np.concatenate([*blocks, np.empty((0, dim), np.float32)])[skip : skip + rows]


def fill(weight: Tensor, seed: int, table: str, dim: int, scale: float, row0: int = 0, col0: int = 0) -> None:
    """Writes initial values into ``weight``, a rectangle of a table; one block of rows is in memory at a time.

    Args:
        weight: [rows, cols], the table's rows from ``row0`` and columns from ``col0``; written in place.
        dim: width of the whole table.
    """
    rows, cols = weight.shape
    with torch.no_grad():
        for start in range(row0 - row0 % BLOCK_ROWS, row0 + rows, BLOCK_ROWS):
            begin, end = max(start, row0), min(start + BLOCK_ROWS, row0 + rows)
            values = initial_rows(seed, table, begin, end - begin, dim, scale)[:, col0 : col0 + cols]
            weight[begin - row0 : end - row0].copy_(torch.from_numpy(np.ascontiguousarray(values)))


def init_tables(model: nn.Module, seed: int, scale: float = 0.0) -> None:
    """Fills all tables of an unsharded model as sharding fills them; tables are known by their path in the model."""
    for info, weight in table_weights(model):
        fill(weight, seed, info.path, info.dim, init_scale(info.rows, scale))


def uniform(words: NDArray[np.uint32], scale: float) -> NDArray[np.float32]:
    """fp32 on [-scale, scale) from words of 32 random bits."""
    unit = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    values: NDArray[np.float32] = (unit * np.float32(2) - np.float32(1)) * np.float32(scale)
    return values


def _block(key: int, number: int, dim: int, scale: float) -> NDArray[np.float32]:
    """[BLOCK_ROWS, dim]. The counter's upper half is the block, its lower half the position within the block."""
    generator = np.random.Philox(key=key, counter=number << 128)
    words = generator.random_raw(BLOCK_ROWS * dim // 2).astype("<u8").view("<u4")
    return uniform(words, scale).reshape(BLOCK_ROWS, dim)
