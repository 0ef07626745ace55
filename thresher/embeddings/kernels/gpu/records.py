"""Tiles of rows: where each is, what its record holds, and writing it back. Formats are those of ``rows/tiers.py``.

A tile is [R, D]: R rows, and as many columns as the widest table of the call has, rounded up to a power of two. Loads
and stores of a tier are masked to its rows, so what a tile costs is what its rows hold.
"""

import triton.language as tl

from thresher.embeddings.kernels.gpu.generator import initial_values, random_bits
from thresher.embeddings.kernels.gpu.kernel import jit
from thresher.embeddings.kernels.gpu.layout import (
    COL0,
    DESC,
    DIM,
    STATE_STRIDE,
    STRIDE,
    WEIGHTS,
    field,
)
from thresher.embeddings.kernels.gpu.rounding import kept_scale, quantised, to_bf16, to_fp16
from thresher.embeddings.rows.tiered import SLOT_BITS, SLOT_MASK
from thresher.embeddings.rows.tiers import Tier

NONE = tl.constexpr(int(Tier.NONE))
DROPPED = tl.constexpr(int(Tier.DROPPED))
INT4 = tl.constexpr(int(Tier.INT4))
INT8 = tl.constexpr(int(Tier.INT8))
FP16 = tl.constexpr(int(Tier.FP16))
FP32 = tl.constexpr(int(Tier.FP32))
HAS_NONE = tl.constexpr(1 << Tier.NONE)  # with tiers at all
HAS_INT4 = tl.constexpr(1 << Tier.INT4)
HAS_INT8 = tl.constexpr(1 << Tier.INT8)
HAS_FP16 = tl.constexpr(1 << Tier.FP16)
HAS_FP32 = tl.constexpr(1 << Tier.FP32)
_SLOT_BITS = tl.constexpr(SLOT_BITS)
_SLOT_MASK = tl.constexpr(SLOT_MASK)


@jit
def tier_in(place: tl.tensor) -> tl.tensor:
    """Tier of an int32 place."""
    return (place >> _SLOT_BITS) & 7


@jit
def slot_in(place: tl.tensor) -> tl.tensor:
    """Slot of an int32 place, int64."""
    return (place & _SLOT_MASK).to(tl.int64)


@jit
def place_for(tier: tl.tensor, slot: tl.tensor) -> tl.tensor:
    """The int32 place of a slot."""
    return (tier << _SLOT_BITS) | slot.to(tl.int32)


@jit
def places_of(numbers: tl.tensor, table: tl.tensor, row: tl.tensor, live: tl.tensor) -> tuple[tl.tensor, ...]:
    """(tier, slot, scale) of rows, each [R]; rows that are not live read as dropped ones."""
    desc = field(numbers, table, DESC)
    both = tl.load((desc + row * 8).to(tl.pointer_type(tl.int64)), mask=live & (desc != 0), other=0)
    place = both.to(tl.int32)
    flat = desc == 0
    tier = tl.where(live, tl.where(flat, FP32, tier_in(place)), DROPPED)
    slot = tl.where(flat, row, slot_in(place))
    return tier, slot, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def set_places(
    numbers: tl.tensor, table: tl.tensor, row: tl.tensor, place: tl.tensor, scale: tl.tensor, live: tl.tensor
) -> None:
    """Writes int32 places and scales of rows of tiered tables."""
    desc = field(numbers, table, DESC)
    both = (scale.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (place.to(tl.int64) & 0xFFFFFFFF)
    tl.store((desc + row * 8).to(tl.pointer_type(tl.int64)), both, mask=live & (desc != 0))


@jit
def inside_of(
    numbers: tl.tensor, table: tl.tensor, live: tl.tensor, align: tl.constexpr, block: tl.constexpr
) -> tl.tensor:
    """[R, D]: the columns that live rows have."""
    dim = tl.multiple_of(field(numbers, table, DIM).to(tl.int32), align)
    return live[:, None] & (tl.arange(0, block)[None, :] < dim[:, None])


@jit
def pointers(start: tl.tensor, columns: tl.tensor, kind: tl.constexpr, align: tl.constexpr) -> tl.tensor:
    """[R, D] pointers to the columns of what begins at addresses ``start`` [R]."""
    first = tl.multiple_of(start, align).to(tl.pointer_type(kind))
    return tl.multiple_of(first, align)[:, None] + columns


@jit
def read_weights(
    numbers: tl.tensor,
    table: tl.tensor,
    row: tl.tensor,
    tier: tl.tensor,
    slot: tl.tensor,
    scale: tl.tensor,
    inside: tl.tensor,
    levels: tl.constexpr,
    align: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """[R, D] fp32 values of rows at (tier, slot, scale), 0 outside."""
    columns = tl.arange(0, block)[None, :]
    start = field(numbers, table, WEIGHTS + tier) + slot * field(numbers, table, STRIDE + tier)
    kind = tier[:, None]
    x = tl.zeros(inside.shape, tl.float32)
    if HAS_FP32 & levels:
        x = tl.load(pointers(start, columns, tl.float32, align), mask=inside & (kind == FP32), other=0.0)
    if HAS_FP16 & levels:
        half = tl.load(pointers(start, columns, tl.float16, align), mask=inside & (kind == FP16), other=0.0)
        x = tl.where(kind == FP16, half.to(tl.float32), x)
    if HAS_INT8 & levels:
        q = tl.load(pointers(start, columns, tl.int8, align), mask=inside & (kind == INT8), other=0)
        x = tl.where(kind == INT8, scale[:, None] * q.to(tl.float32), x)
    if HAS_INT4 & levels:
        middle = (field(numbers, table, DIM) // 2)[:, None].to(tl.int32)
        upper = columns >= middle
        at = pointers(start, tl.where(upper, columns - middle, columns), tl.int8, 1)
        both = tl.load(at, mask=inside & (kind == INT4), other=0).to(tl.int32)
        q = (both >> tl.where(upper, 4, 0)) & 15
        q = tl.where(q > 7, q - 16, q)
        x = tl.where(kind == INT4, scale[:, None] * q.to(tl.float32), x)
    if HAS_NONE & levels:
        fresh_rows = tl.sum((tier == NONE).to(tl.int32), axis=0)
        if fresh_rows > 0:
            fresh = initial_values(numbers, table, row, tier == NONE, columns)
            x = tl.where(inside & (kind == NONE), fresh, x)
    return x


@jit
def read_state(
    numbers: tl.tensor,
    table: tl.tensor,
    tier: tl.tensor,
    slot: tl.tensor,
    inside: tl.tensor,
    which: tl.constexpr,
    levels: tl.constexpr,
    align: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """[R, D] fp32: the optimizer vector whose addresses are ``which``; zeros of rows without a record."""
    columns = tl.arange(0, block)[None, :]
    start = field(numbers, table, which + tier) + slot * field(numbers, table, STATE_STRIDE + tier)
    kind = tier[:, None]
    state = tl.zeros(inside.shape, tl.float32)
    if HAS_FP32 & levels:
        state = tl.load(pointers(start, columns, tl.float32, align), mask=inside & (kind == FP32), other=0.0)
    if HAS_NONE & levels:
        short = inside & (kind >= INT4) & (kind <= FP16)
        bits = tl.load(pointers(start, columns, tl.int16, align), mask=short, other=0).to(tl.int32) << 16
        state = tl.where(short, bits.to(tl.float32, bitcast=True), state)
    return state


@jit
def write_weights(
    numbers: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    tier: tl.tensor,
    slot: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    inside: tl.tensor,
    stream: tl.constexpr,
    levels: tl.constexpr,
    align: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """Encodes x [R, D] at (tier, slot) and returns the scales [R]; ``scale`` is an old one that may be kept, or 0."""
    columns = tl.arange(0, block)[None, :]
    start = field(numbers, table, WEIGHTS + tier) + slot * field(numbers, table, STRIDE + tier)
    kind = tier[:, None]
    bits = tl.zeros(inside.shape, tl.uint32)
    if HAS_NONE & levels:
        bits = random_bits(keys, field(numbers, table, COL0)[:, None] + columns, stream)
    fresh = tl.zeros_like(scale)
    if HAS_FP32 & levels:
        tl.store(pointers(start, columns, tl.float32, align), x, mask=inside & (kind == FP32))
    if HAS_FP16 & levels:
        tl.store(pointers(start, columns, tl.float16, align), to_fp16(x, bits), mask=inside & (kind == FP16))
    if HAS_INT8 & levels:
        fresh = tl.where(tier == INT8, kept_scale(x, scale, 127), fresh)
        q = quantised(x, fresh, bits, 127).to(tl.int8)
        tl.store(pointers(start, columns, tl.int8, align), q, mask=inside & (kind == INT8))
    if HAS_INT4 & levels:
        fresh = tl.where(tier == INT4, kept_scale(x, scale, 7), fresh)
        q = quantised(x, fresh, bits, 7).to(tl.int32) & 15
        middle = (field(numbers, table, DIM) // 2)[:, None].to(tl.int32)
        partner = tl.minimum(columns + middle, block - 1)
        packed = (q | (tl.gather(q, partner, 1) << 4)).to(tl.int8)
        tl.store(pointers(start, columns, tl.int8, align), packed, mask=inside & (kind == INT4) & (columns < middle))
    return fresh


@jit
def write_state(
    numbers: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    tier: tl.tensor,
    slot: tl.tensor,
    state: tl.tensor,
    inside: tl.tensor,
    which: tl.constexpr,
    stream: tl.constexpr,
    levels: tl.constexpr,
    align: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Encodes one optimizer vector [R, D]."""
    columns = tl.arange(0, block)[None, :]
    start = field(numbers, table, which + tier) + slot * field(numbers, table, STATE_STRIDE + tier)
    kind = tier[:, None]
    if HAS_FP32 & levels:
        tl.store(pointers(start, columns, tl.float32, align), state, mask=inside & (kind == FP32))
    if HAS_NONE & levels:
        bits = random_bits(keys, field(numbers, table, COL0)[:, None] + columns, stream)
        short = inside & (kind >= INT4) & (kind <= FP16)
        tl.store(pointers(start, columns, tl.int16, align), to_bf16(state, bits), mask=short)
