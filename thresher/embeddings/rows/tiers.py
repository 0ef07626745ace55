"""The precisions a row can have, and the bytes of its record.

A record is the row's weights followed by its optimizer vectors, if the optimizer keeps any (Adagrad 1, Adam 2, ...):

    fp32   D x 4 B weights                       k x D x 4 B state (fp32)
    fp16   D x 2 B weights                       k x D x 2 B state (bf16)
    int8   D x 1 B weights, value = scale * q    k x D x 2 B state (bf16)     q in -127..127
    int4   D / 2 B weights, value = scale * q    k x D x 2 B state (bf16)     q in -7..7

Byte i of an int4 row holds q[i] in its low and q[i + D/2] in its high four bits, as two's complement. Records are
padded to 4 bytes. The scale, the optimizer's scalar and the priority stand outside the record (``tiered.py``).
"""

from enum import IntEnum

from thresher.errors import ConfigError, nearest


class Tier(IntEnum):
    """Precision of a row; a higher number is more precise. The numbers are part of the storage format."""

    NONE = 0
    """Never updated: has no record, reads as its initial values (a function of seed, table and row)."""
    DROPPED = 1
    """Has no record and reads as zeros."""
    INT4 = 2
    INT8 = 3
    FP16 = 4
    FP32 = 5


STORED = (Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)
"""Tiers with a record."""
LEVELS = {Tier.INT4: 7, Tier.INT8: 127}
"""Largest |q| of the tiers with a scale."""
_WEIGHT_BITS = {Tier.INT4: 4, Tier.INT8: 8, Tier.FP16: 16, Tier.FP32: 32}


def weight_bytes(tier: Tier, dim: int) -> int:
    """Bytes of the weights of a row of ``dim`` (even) columns; 0 for tiers without a record."""
    return _WEIGHT_BITS.get(tier, 0) * dim // 8


def state_bytes(tier: Tier, dim: int, vectors: int) -> int:
    """Bytes of a row's ``vectors`` optimizer vectors."""
    if tier not in STORED:
        return 0
    return vectors * dim * (4 if tier is Tier.FP32 else 2)


def record_bytes(tier: Tier, dim: int, vectors: int = 0) -> int:
    """Distance between two records of a tier in its slab."""
    weights = weight_bytes(tier, dim)
    aligned = -(-weights // 4) * 4 if vectors else weights
    return -(-(aligned + state_bytes(tier, dim, vectors)) // 4) * 4


def state_offset(tier: Tier, dim: int) -> int:
    """Where a record's optimizer vectors start."""
    return -(-weight_bytes(tier, dim) // 4) * 4


def parse_tier(name: str, where: str) -> Tier:
    """The tier called ``name`` (``fp32``, ``fp16``, ``int8``, ``int4``, ``dropped``).

    Raises:
        ConfigError: there is none of that name.
    """
    names = {tier.name.lower(): tier for tier in Tier if tier is not Tier.NONE}
    if name not in names:
        raise ConfigError(f"'{name}' is no tier", where=where, fix=nearest(name, names))
    return names[name]
