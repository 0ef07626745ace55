"""Dropout whose mask is a function of a key: the same whenever and wherever it is drawn, and never kept."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.errors import ConfigError


@dataclass(frozen=True)
class DropKey:
    """What a mask depends on, besides its shape and the kind of device."""

    seed: int
    step: int
    microbatch: int
    slice: int
    layer: int
    site: int

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator in the state that belongs to this key."""
        parts = (self.seed, self.step, self.microbatch, self.slice, self.layer, self.site)
        digest = hashlib.blake2b(struct.pack("<6q", *parts), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_dropout(values: Tensor, share: float, keys: Sequence[DropKey], lengths: Sequence[int]) -> Tensor:
    """Zeroes ``share`` of ``values`` [B, T, ...] and divides the rest by 1 - share.

    Args:
        values: what to drop from.
        share: of values set to zero, 0 <= share < 1.
        keys: one per slice in ``values``.
        lengths: tokens of these slices, T in all.

    Raises:
        ConfigError: ``share`` is not in 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"dropout of a share of {share}", fix="choose a share of at least 0 and below 1")
    if share == 0:
        return values
    out: Tensor = _Dropout.apply(values, share, tuple(keys), tuple(lengths))  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float, keys: tuple[DropKey, ...], lengths: tuple[int, ...]) -> Tensor:
        ctx.draw = (share, keys, lengths)
        return _apply(values, share, keys, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(gradient, *ctx.draw), None, None, None


def _apply(values: Tensor, share: float, keys: tuple[DropKey, ...], lengths: tuple[int, ...]) -> Tensor:
    out = torch.empty_like(values)
    pieces = zip(keys, torch.split(values, list(lengths), 1), torch.split(out, list(lengths), 1), strict=True)
    for key, source, target in pieces:
        kept = torch.empty(source.shape, dtype=torch.bool, device=values.device)
        kept.bernoulli_(1 - share, generator=key.generator(values.device))
        torch.mul(source, kept, out=target).mul_(1 / (1 - share))
    return out
