"""Rotary positions (Su et al. 2021, "RoFormer", arXiv:2104.09864, section 3.2), over halves of a head."""

from typing import Any

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(values: Tensor, positions: Tensor) -> Tensor:
    """[B, H, T, E] turned by the positions [T]: pair (i, i + E/2) by the angle position * BASE ** (-2i / E)."""
    rotated: Tensor = _Rotation.apply(values, positions)  # type: ignore[no-untyped-call]
    return rotated


class _Rotation(torch.autograd.Function):
    """Keeps positions only: angles are computed anew in the backward, which turns back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        return _turned(values, positions, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return _turned(gradients[0], positions, -1.0), None


def _turned(values: Tensor, positions: Tensor, sign: float) -> Tensor:
    half = values.shape[-1] // 2
    # Angles of far positions need the digits of float64.
    steps = torch.arange(half, dtype=torch.float64, device=values.device)
    angles = sign * positions.to(torch.float64).unsqueeze(1) * BASE ** (-steps / half)
    cos, sin = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    first, second = values[..., :half], values[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
