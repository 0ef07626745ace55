"""Negative items as a pure function of (seed, sample, epoch, place): equal on any number of ranks, after any resume."""

import torch
from torch import Tensor


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch shifts int64 arithmetically."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def scramble(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014), a bijection of int64 (as 64 unsigned bits)."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shift(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shift(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shift(values, 31)


def sample_negatives(
    positives: Tensor, counter: tuple[Tensor, Tensor, Tensor], seed: int, count: int, items: range
) -> Tensor:
    """``count`` items for each positive, uniform over ``items`` without the positive, with replacement.

    Args:
        positives: [N] int64.
        counter: sample index, epoch and place, each [N] int64.
        items: at least two rows.

    Returns:
        [N, count] int64. The k-th depends on (seed, index, epoch, place, k) and, by stepping over it, the positive.
    """
    state = scramble(torch.full_like(positives, seed))
    for part in counter:
        state = scramble(state ^ part)
    draws = scramble(state.unsqueeze(1) + torch.arange(count, device=positives.device) * _signed(0xD1B54A32D192ED03))
    # 63 bits onto the range: the bias is below items / 2^63.
    rows = items.start + _shift(draws, 1) % (len(items) - 1)
    return rows + (rows >= positives.clamp(min=items.start).unsqueeze(1)).to(torch.int64)
