"""Random numbers in kernels: the bits of ``rows/generator.py`` and the initial values of ``embeddings/init.py``."""

import triton.language as tl

from thresher.embeddings.init import BLOCK_ROWS
from thresher.embeddings.kernels.gpu.kernel import jit
from thresher.embeddings.kernels.gpu.layout import (
    COL0,
    FULL_DIM,
    INIT_HIGH,
    INIT_LOW,
    INIT_SCALE,
    KNOWN,
    ROUND_KEY,
    ROW0,
    STEP,
    count,
    field,
)
from thresher.embeddings.rows import generator

_GOLDEN64 = tl.constexpr(generator.GOLDEN64)
_MIX64_1 = tl.constexpr(generator.MIX64[0])
_MIX64_2 = tl.constexpr(generator.MIX64[1])
_GOLDEN32 = tl.constexpr(generator.GOLDEN32)
_STREAM32 = tl.constexpr(generator.STREAM32)
_MIX32_1 = tl.constexpr(generator.MIX32[0])
_MIX32_2 = tl.constexpr(generator.MIX32[1])
_LOW = tl.constexpr(0xFFFFFFFF)

# Philox4x64-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; the constants of Random123.
_FACTOR_0 = tl.constexpr(0xD2E7470EE14C6C93)
_FACTOR_2 = tl.constexpr(0xCA5A826395121157)
_BUMP_0 = tl.constexpr(0x9E3779B97F4A7C15)
_BUMP_1 = tl.constexpr(0xBB67AE8584CAA73B)
_ROUNDS = tl.constexpr(10)
_BLOCK_BITS = tl.constexpr(BLOCK_ROWS.bit_length() - 1)
_BLOCK_MASK = tl.constexpr(BLOCK_ROWS - 1)
_UNIT = tl.constexpr(2.0**-24)


@jit
def known_as(numbers: tl.tensor, table: tl.tensor, row: tl.tensor, live: tl.tensor) -> tl.tensor:
    """[R] int64: what rows are known by to the generators."""
    identity = field(numbers, table, KNOWN)
    at = (identity + row * 8).to(tl.pointer_type(tl.int64))
    return tl.load(at, mask=live & (identity != 0), other=0) + tl.where(
        identity == 0, row + field(numbers, table, ROW0), 0
    )


@jit
def row_keys(numbers: tl.tensor, counts: tl.tensor, table: tl.tensor, row: tl.tensor, live: tl.tensor) -> tl.tensor:
    """[R] uint64 keys of the rounding of rows at the table's step."""
    known = known_as(numbers, table, row, live).to(tl.uint64)
    key = field(numbers, table, ROUND_KEY).to(tl.uint64)
    z = ((known * _GOLDEN64) ^ key) + count(counts, table, STEP).to(tl.uint64)
    z = (z ^ (z >> 30)) * _MIX64_1
    z = (z ^ (z >> 27)) * _MIX64_2
    return z ^ (z >> 31)


@jit
def random_bits(keys: tl.tensor, columns: tl.tensor, stream: tl.constexpr) -> tl.tensor:
    """[R, D] uint32 for row keys [R] and columns [R, D] of the whole table."""
    low = (keys & _LOW).to(tl.uint32)[:, None]
    high = (keys >> 32).to(tl.uint32)[:, None]
    x = (low + columns.to(tl.uint32) * _GOLDEN32) ^ (high + (stream * _STREAM32) % (1 << 32))
    x = (x ^ (x >> 16)) * _MIX32_1
    x = (x ^ (x >> 13)) * _MIX32_2
    return x ^ (x >> 16)


@jit
def initial_values(
    numbers: tl.tensor, table: tl.tensor, row: tl.tensor, live: tl.tensor, columns: tl.tensor
) -> tl.tensor:
    """[R, D] fp32 initial values of rows [R] in the columns [1, D] of this rectangle.

    Every number draws the four words of its counter for itself: rows without a record are read once in a lifetime.
    """
    known = known_as(numbers, table, row, live)
    width = field(numbers, table, FULL_DIM)
    first = (known & _BLOCK_MASK) * width + field(numbers, table, COL0)
    word = first[:, None] + columns
    c0 = (word >> 3).to(tl.uint64) + 1
    c1 = tl.zeros_like(c0)
    c2 = c1 + (known.to(tl.uint64) >> _BLOCK_BITS)[:, None]
    c3 = c1
    k0 = field(numbers, table, INIT_LOW).to(tl.uint64)[:, None]
    k1 = field(numbers, table, INIT_HIGH).to(tl.uint64)[:, None]
    for _ in tl.static_range(_ROUNDS):
        upper_0 = tl.umulhi(c0, tl.full(c0.shape, _FACTOR_0, tl.uint64))
        upper_2 = tl.umulhi(c2, tl.full(c2.shape, _FACTOR_2, tl.uint64))
        lower_0 = c0 * _FACTOR_0
        c0 = upper_2 ^ c1 ^ k0
        c1 = c2 * _FACTOR_2
        c2 = upper_0 ^ c3 ^ k1
        c3 = lower_0
        k0 += _BUMP_0
        k1 += _BUMP_1
    which = (word >> 1) & 3
    drawn = tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))
    half = (drawn >> ((word & 1) * 32).to(tl.uint64)) & _LOW
    unit = (half >> 8).to(tl.float32) * _UNIT
    scale = field(numbers, table, INIT_SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    return (unit * 2.0 - 1.0) * scale[:, None]
