"""Random bits for stochastic rounding, a pure function of (table key, row, step, stream, column).

No state is kept, so the numbers do not depend on rank, thread, sharding or order. A row's 64-bit key is the finaliser
of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014) over key, row and step; the bits
of a column are the 32-bit finaliser of MurmurHash3 over both halves of it:

    z    = splitmix64((key ^ row * GOLDEN64) + step * STEP64)                     64 bits, wrapping
    bits = fmix32((low32(z) + column * GOLDEN32) ^ (high32(z) + stream * STREAM32))    32 bits, wrapping

``row`` is the row of the whole table (or the raw id of a dynamic one), ``column`` that of the whole table, so a shard
draws what the unsharded table draws. Torch has no unsigned arithmetic: int64 wraps as uint64 does, and 32-bit words are
kept in the low half of an int64.
"""

import hashlib

import torch
from torch import Tensor

GOLDEN64 = 0x9E3779B97F4A7C15
STEP64 = 0xBF58476D1CE4E5B9
MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
GOLDEN32 = 0x9E3779B9
STREAM32 = 0x85EBCA6B
MIX32 = (0x85EBCA6B, 0xC2B2AE35)
WEIGHTS, FIRST_STATE, SECOND_STATE, DEMOTED = 0, 1, 2, 8
"""Streams: rounding of weights and optimizer vectors in an update; ``DEMOTED`` + the same when a row is demoted."""
_LOW = 0xFFFFFFFF


def table_key(seed: int, table: str) -> int:
    """The key of a table, a signed 64-bit number; ``table`` is its path in the model."""
    digest = hashlib.blake2b(f"{seed}/{table}/rounding".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def row_keys(key: int, rows: Tensor, step: int) -> Tensor:
    """[n] int64 keys of ``rows`` [n] int64 at ``step``."""
    z = (rows * _signed(GOLDEN64)) ^ key
    z = z + _signed(step * STEP64 & (1 << 64) - 1)
    for shift, factor in zip((30, 27), MIX64, strict=True):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def random_bits(keys: Tensor, columns: int, stream: int, col0: int = 0) -> Tensor:
    """[n, columns] of 32 random bits in int64 (0 .. 2^32 - 1) for row keys [n], columns from ``col0`` on."""
    low, high = keys & _LOW, _shifted(keys, 32)
    steps = torch.arange(col0, col0 + columns, device=keys.device) * GOLDEN32
    x = ((low.unsqueeze(1) + steps) & _LOW) ^ ((high + stream * STREAM32) & _LOW).unsqueeze(1)
    for shift, factor in zip((16, 13), MIX32, strict=True):
        x = ((x ^ (x >> shift)) * factor) & _LOW
    return x ^ (x >> 16)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of 64-bit words."""
    return (value >> bits) & ((1 << 64 - bits) - 1)
