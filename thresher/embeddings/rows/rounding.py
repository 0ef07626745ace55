"""Rows to records and back: stochastic rounding, exact to the bit in every backend.

With random bits r (32 of them, ``generator.py``) and u = (r >> 8) * 2^-24 in [0, 1), all in fp32:

    int8, int4   i = 1 / s where s > 0, else 0;   q = floor(x * i + u), cut to -levels .. levels;   value = s * q
    fp16         |x| >= 2^-14: bits(|x|) + (r & 0x1FFF), the low 13 bits cleared, at most 65504
                 |x| <  2^-14: floor(|x| * 2^24 + u) * 2^-24                                (fp16 subnormals)
    bf16         bits(x) + (r & 0xFFFF), the low 16 bits cleared                            (state vectors)

Every one of them is unbiased: its expectation is x. Without bits the nearest value is taken (ties to even).
"""

import torch
from torch import Tensor

from thresher.embeddings.rows.tiers import LEVELS, Tier

FP16_MAX = 65504.0
_FP16_NORMAL = 2.0**-14
_FP16_QUANTUM = 2.0**-24


def unit(bits: Tensor) -> Tensor:
    """fp32 in [0, 1) from 32 random bits in int64."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def kept_scale(x: Tensor, scale: Tensor, tier: Tier) -> Tensor:
    """[n] fp32: the scale of each row of x [n, D], the old one where it still fits."""
    levels = LEVELS[tier]
    largest = x.abs().amax(1)
    fits = (largest >= (0.5 * levels) * scale) & (largest <= levels * scale)
    # A tensor, because torch divides by a Python number on CUDA by its inverse.
    return torch.where(fits, scale, largest / torch.tensor(float(levels), device=x.device))


def quantised(x: Tensor, scale: Tensor, tier: Tier, bits: Tensor | None) -> Tensor:
    """[n, D] fp32 whole numbers q within the tier's levels."""
    levels = LEVELS[tier]
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    y = x * inverse.unsqueeze(1)
    q = y.round() if bits is None else (y + unit(bits)).floor()
    return q.clamp(-levels, levels)


def to_fp16(x: Tensor, bits: Tensor | None) -> Tensor:
    """fp16 of the shape of x."""
    size = x.abs()
    if bits is None:
        return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)
    raised = size.view(torch.int32) + (bits & 0x1FFF).to(torch.int32)
    normal = (raised & ~0x1FFF).view(torch.float32).clamp(max=FP16_MAX)
    small = (size * 2.0**24 + unit(bits)).floor() * _FP16_QUANTUM
    return torch.where(size >= _FP16_NORMAL, normal, small).copysign(x).to(torch.float16)


def to_bf16(x: Tensor, bits: Tensor | None) -> Tensor:
    """bf16 of the shape of x."""
    if bits is None:
        return x.to(torch.bfloat16)
    raised = x.view(torch.int32).to(torch.int64) + (bits & 0xFFFF)
    return (raised >> 16).to(torch.int16).view(torch.bfloat16)


def pack_int4(q: Tensor) -> Tensor:
    """[n, D / 2] uint8 from whole numbers [n, D]."""
    low, high = (q.to(torch.int16) & 15).chunk(2, dim=1)
    return (low | high << 4).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """[n, D] fp32 whole numbers from [n, D / 2] uint8."""
    both = torch.cat([packed & 15, packed >> 4], dim=1).to(torch.int16)
    return torch.where(both > 7, both - 16, both).to(torch.float32)
