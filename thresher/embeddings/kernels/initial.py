"""Initial values of single rows: the numbers of ``init.py``, without drawing the block of rows around each.

Philox-4x64-10 (Salmon et al., 2011) over many counters at once; NumPy's own makes one stream at a time.
"""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thresher.embeddings.init import BLOCK_ROWS, init_key, uniform
from thresher.embeddings.rows.tiered import TieredTable

Words: TypeAlias = NDArray[np.uint64]

_ROUNDS = 10
_FACTORS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_WORD, _LOW, _HALF = (1 << 64) - 1, np.uint64(0xFFFFFFFF), np.uint64(32)
_NUMBERS = 8
"""Numbers of 32 bits that one counter gives."""


def known_as(table: TieredTable, rows: Tensor) -> Tensor:
    """[n] int64: what rows are known by to the generators."""
    return rows + table.row0 if table.identity is None else table.identity[rows]


def initial_values(table: TieredTable, rows: Tensor) -> Tensor:
    """[n, D] fp32 initial values of ``rows`` [n] int64."""
    ids = known_as(table, rows).cpu().numpy().view(np.uint64)
    block, row = ids // np.uint64(BLOCK_ROWS), ids % np.uint64(BLOCK_ROWS)
    first = row.astype(np.int64) * table.full_dim + table.col0
    counter = first // _NUMBERS
    each = np.arange((table.dim - 1) // _NUMBERS + 2)
    words = _philox(init_key(table.seed, table.path), counter[:, None] + each, block[:, None])
    numbers = words.reshape(len(ids), -1).astype("<u8").view("<u4")
    places = (first % _NUMBERS)[:, None] + np.arange(table.dim)
    values = uniform(np.take_along_axis(numbers, places, axis=1), table.init_scale)
    return torch.from_numpy(values).to(table.device)


def _philox(key: int, low: NDArray[np.int64], high: Words) -> Words:
    """[..., 4] words of the counters ``low + 1`` (NumPy counts up before it draws) and, 128 bits above, ``high``."""
    zeros = np.zeros(low.shape, np.uint64)
    c = [low.astype(np.uint64) + np.uint64(1), zeros, zeros + high, zeros]
    for turn in range(_ROUNDS):
        k0, k1 = (
            np.uint64((part + turn * step) & _WORD) for part, step in zip((key & _WORD, key >> 64), _WEYL, strict=True)
        )
        high0, low0 = _product(_FACTORS[0], c[0])
        high1, low1 = _product(_FACTORS[1], c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
    return np.stack(c, axis=-1)


def _product(a: np.uint64, b: Words) -> tuple[Words, Words]:
    """Upper and lower 64 bits of a product."""
    a0, a1, b0, b1 = a & _LOW, a >> _HALF, b & _LOW, b >> _HALF
    middle = a1 * b0 + (a0 * b0 >> _HALF)
    lower = a0 * b1 + (middle & _LOW)
    return a1 * b1 + (middle >> _HALF) + (lower >> _HALF), a * b
