"""Blocks of rows cut and joined by columns, for a checkpoint that is loaded into other column shards.

Cutting keeps every number: a part keeps its row's scale. Joining keeps every number too, unless a row is int8 or int4
and its parts have different scales: such rows are rounded to nearest with one scale for the whole row, so that each
number moves by at most half of the largest of the parts' steps (scale = absmax / levels).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thresher.embeddings.rows.rounding import quantised, to_fp16
from thresher.embeddings.rows.tiers import LEVELS, STORED, Tier
from thresher.errors import CheckpointError
from thresher.sharding.tier_blocks import Block, numbers_of, records_of, rows_of, state_of


def cut(block: Block, first: int, last: int) -> Block:
    """Columns ``first`` up to but not including ``last`` of the block."""
    if (first, last) == (0, block.columns):
        return block
    records = {}
    for tier, raw in block.records.items():
        numbers = numbers_of(raw, tier, block.columns)[:, first:last]
        records[tier] = records_of(numbers, state_of(raw, tier, block.columns, block.vectors)[:, :, first:last], tier)
    return replace(block, records=records, columns=last - first)


def joined(parts: Sequence[Block]) -> Block:
    """One block of parts that lie side by side, left to right.

    Raises:
        CheckpointError: the parts hold different rows.
    """
    left = parts[0]
    if len(parts) == 1:
        return left
    if any(not torch.equal(part.rows, left.rows) for part in parts):
        raise CheckpointError("column shards of a table hold different rows", fix="restore it from a copy")
    tier = torch.stack([part.tier for part in parts]).amax(0)
    alike = torch.ones(len(tier), dtype=torch.bool)
    for part in parts:
        alike &= (part.tier == tier) & (part.scale == left.scale)
    scale = torch.where(alike, left.scale, 0.0)
    records: dict[Tier, list[tuple[Tensor, Tensor]]] = {}
    for level in STORED:
        for chosen, join in ((tier == level) & alike, _together), ((tier == level) & ~alike, _anew):
            if chosen.any():
                found, scale[chosen] = join([part.only(chosen) for part in parts], level)
                records.setdefault(level, []).append((chosen.nonzero()[:, 0], found))
    whole = {level: _in_order(found) for level, found in records.items()}
    return replace(left, tier=tier, scale=scale, records=whole, columns=sum(part.columns for part in parts))


def _together(parts: Sequence[Block], tier: Tier) -> tuple[Tensor, Tensor]:
    """Records of rows whose parts are of one tier and scale, and the scales."""
    numbers = torch.cat([numbers_of(part.records[tier], tier, part.columns) for part in parts], dim=1)
    state = torch.cat([state_of(part.records[tier], tier, part.columns, part.vectors) for part in parts], dim=2)
    return records_of(numbers, state, tier), parts[0].scale


def _anew(parts: Sequence[Block], tier: Tier) -> tuple[Tensor, Tensor]:
    """Records of rows whose parts differ, rounded to nearest, and their scales."""
    values = torch.cat([rows_of(part) for part in parts], dim=1)
    state = torch.cat([_states(part) for part in parts], dim=2)
    return encode(values, state, tier)


def encode(values: Tensor, state: Tensor, tier: Tier) -> tuple[Tensor, Tensor]:
    """[k, record bytes] and scales [k] of values [k, columns] and vectors [k, vectors, columns], to nearest."""
    scale = torch.zeros(len(values))
    if tier in LEVELS:
        scale = values.abs().amax(1) / LEVELS[tier]
        numbers = quantised(values, scale, tier, None).to(torch.int8)
    else:
        numbers = values if tier is Tier.FP32 else to_fp16(values, None)
    kept = state if tier is Tier.FP32 else state.to(torch.bfloat16)
    return records_of(numbers, kept, tier), scale


def _states(block: Block) -> Tensor:
    """[n, vectors, columns] fp32 of all rows; zeros where there is no record."""
    state = torch.zeros(len(block.rows), block.vectors, block.columns)
    for tier, raw in block.records.items():
        state[block.tier == tier] = state_of(raw, tier, block.columns, block.vectors).float()
    return state


def _in_order(found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Records of several groups of rows, in the order of the rows."""
    order = torch.cat([rows for rows, _ in found]).argsort()
    return torch.cat([raw for _, raw in found])[order]
