"""The rounding of ``rows/rounding.py`` in kernels, to the bit. ``bits`` are uint32."""

import triton.language as tl

from thresher.embeddings.kernels.gpu.kernel import jit
from thresher.embeddings.rows import rounding

_UNIT = tl.constexpr(2.0**-24)
_FP16_MAX = tl.constexpr(rounding.FP16_MAX)
_FP16_NORMAL = tl.constexpr(2.0**-14)
_FP16_STEPS = tl.constexpr(2.0**24)
_SIGN = tl.constexpr(-(1 << 31))


@jit
def unit(bits: tl.tensor) -> tl.tensor:
    """fp32 in [0, 1)."""
    return (bits >> 8).to(tl.float32) * _UNIT


@jit
def kept_scale(x: tl.tensor, scale: tl.tensor, levels: tl.constexpr) -> tl.tensor:
    """[R] fp32: the scale of each row of x [R, D], the old one where it still fits."""
    largest = tl.max(tl.abs(x), axis=1)
    fits = (largest >= (0.5 * levels) * scale) & (largest <= levels * scale)
    return tl.where(fits, scale, tl.math.div_rn(largest, tl.zeros_like(largest) + levels))


@jit
def quantised(x: tl.tensor, scale: tl.tensor, bits: tl.tensor, levels: tl.constexpr) -> tl.tensor:
    """[R, D] fp32 whole numbers within the levels."""
    there = scale > 0.0
    ones = tl.zeros_like(scale) + 1.0
    inverse = tl.where(there, tl.math.div_rn(ones, tl.where(there, scale, 1.0)), 0.0)
    q = tl.floor(x * inverse[:, None] + unit(bits))
    return tl.minimum(tl.maximum(q, -1.0 * levels), 1.0 * levels)


@jit
def to_fp16(x: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """fp16 of the shape of x."""
    size = tl.abs(x)
    raised = size.to(tl.int32, bitcast=True) + (bits & 0x1FFF).to(tl.int32)
    normal = tl.minimum((raised & ~0x1FFF).to(tl.float32, bitcast=True), _FP16_MAX)
    small = tl.floor(size * _FP16_STEPS + unit(bits)) * _UNIT
    chosen = tl.where(size >= _FP16_NORMAL, normal, small)
    signed = chosen.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & _SIGN)
    return signed.to(tl.float32, bitcast=True).to(tl.float16)


@jit
def to_bf16(x: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """The bits of bf16 as int16, of the shape of x."""
    raised = x.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)
    return (raised >> 16).to(tl.int16)
