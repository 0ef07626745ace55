"""Rows of a tiered table to tensors and back, and the slots they take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embeddings.kernels.initial import initial_values, known_as
from thresher.embeddings.rows.generator import FIRST_STATE, WEIGHTS, random_bits, row_keys, table_key
from thresher.embeddings.rows.rounding import kept_scale, pack_int4, quantised, to_bf16, to_fp16, unpack_int4
from thresher.embeddings.rows.tiered import FREE, HIGH, SLOT_BITS, SLOT_MASK, TieredTable
from thresher.embeddings.rows.tiers import LEVELS, Tier, state_offset, weight_bytes


@dataclass
class Rows:
    """Rows of a tiered table as they read.

    Attributes:
        rows: [n] int64.
        tier, slot: [n] int64.
        scale: [n] fp32, 0 in tiers without one.
        x: [n, D] fp32.
        vectors: [n, D] fp32 each.
    """

    rows: Tensor
    tier: Tensor
    slot: Tensor
    scale: Tensor
    x: Tensor
    vectors: list[Tensor]


class Noise:
    """Random bits for the rounding of some rows of a table at its present step."""

    def __init__(self, table: TieredTable, rows: Tensor, first_stream: int) -> None:
        self._keys = row_keys(table_key(table.seed, table.path), known_as(table, rows), table.step)
        self._columns, self._col0, self._first = table.dim, table.col0, first_stream

    def bits(self, chosen: Tensor, stream: int) -> Tensor:
        """[k, D] of 32 bits in int64, of the rows at ``chosen``."""
        return random_bits(self._keys[chosen], self._columns, self._first + stream, self._col0)


def read_rows(table: TieredTable, rows: Tensor, *, with_state: bool) -> Rows:
    """What ``rows`` [n] int64 hold; state vectors of rows without a record are zeros."""
    desc = table.desc[rows]
    place = desc[:, 0].to(torch.int64)
    tier, slot = (place >> SLOT_BITS) & 7, place & SLOT_MASK
    shape = (len(rows), table.dim)
    x = torch.zeros(shape, device=table.device)
    vectors = [torch.zeros(shape, device=table.device) for _ in range(table.n_vectors if with_state else 0)]
    found = Rows(rows, tier, slot, desc[:, 1].contiguous().view(torch.float32), x, vectors)
    for level in table.stored_levels:
        chosen = (tier == level).nonzero()[:, 0]
        if len(chosen):
            _decode(table, level, chosen, found)
    fresh = (tier == Tier.NONE).nonzero()[:, 0]
    if len(fresh):
        x[fresh] = initial_values(table, rows[fresh])
    return found


def store_rows(
    table: TieredTable, found: Rows, target: Tensor, x: Tensor, vectors: Sequence[Tensor], noise: Noise | None
) -> None:
    """Stores values ``x`` [n, D] and state in tiers ``target`` [n], for which slots must be free, and updates ``desc``.

    A row that stays in its tier keeps its slot and, where it still fits, its scale. Slots that rows leave become free
    at the end, in ascending order of rows. Without ``noise`` values are rounded to nearest.
    """
    moves = target != found.tier
    slot, scale = torch.where(moves, 0, found.slot), torch.zeros_like(found.scale)
    for level in table.stored_levels:
        chosen = (target == level).nonzero()[:, 0]
        arrivals = chosen[moves[chosen]]
        slot[arrivals] = take_slots(table, level, len(arrivals))
        if len(chosen):
            old = torch.where(moves, 0.0, found.scale)[chosen]
            raw, scale[chosen] = _encode(table, level, x[chosen], [v[chosen] for v in vectors], old, noise, chosen)
            _records(table, level)[slot[chosen]] = raw
    for level in table.stored_levels:
        free_slots(table, level, found.slot[moves & (found.tier == level)])
    place = (target << SLOT_BITS | slot).to(torch.int32)
    table.desc[found.rows] = torch.stack([place, scale.view(torch.int32)], dim=1)


def free_count(table: TieredTable, tier: Tier) -> int:
    """Slots of ``tier`` that can be taken."""
    high, free = table.count[tier].tolist()
    return int(table.slots[tier] - high + free)


def take_slots(table: TieredTable, tier: Tier, number: int) -> Tensor:
    """[number] int64 slots, free ones first."""
    high, free = table.count[tier].tolist()
    reused = min(number, free)
    table.count[tier, FREE] -= reused
    table.count[tier, HIGH] += number - reused
    stack = table.free[tier][free - reused : free].to(torch.int64).flip(0)
    return torch.cat([stack, torch.arange(high, high + number - reused, device=table.device)])


def free_slots(table: TieredTable, tier: Tier, slots: Tensor) -> None:
    """Puts ``slots`` [k] int64 on the free stack."""
    free = int(table.count[tier, FREE])
    table.free[tier][free : free + len(slots)] = slots.to(torch.int32)
    table.count[tier, FREE] += len(slots)


def move_records(table: TieredTable, tier: Tier, rows: Tensor) -> None:
    """Moves the records of ``rows``, all rows of a tier, into slots 0 .. n - 1."""
    slot = table.desc[rows, 0].to(torch.int64) & SLOT_MASK
    taken = torch.zeros(len(rows), dtype=torch.bool, device=table.device)
    taken[slot[slot < len(rows)]] = True
    late = (slot >= len(rows)).nonzero()[:, 0]
    holes = (~taken).nonzero()[:, 0]
    records = _records(table, tier)
    records[holes] = records[slot[late]]
    table.desc[rows[late], 0] = (holes | int(tier) << SLOT_BITS).to(torch.int32)


def _records(table: TieredTable, tier: Tier) -> Tensor:
    """[slots, record bytes] uint8."""
    return table.slabs[tier].view(table.slots[tier], table.record_bytes(tier))


def _decode(table: TieredTable, tier: Tier, chosen: Tensor, found: Rows) -> None:
    raw = _records(table, tier)[found.slot[chosen]]
    weights = raw[:, : weight_bytes(tier, table.dim)].contiguous()
    scale = found.scale[chosen].unsqueeze(1)
    match tier:
        case Tier.FP32:
            found.x[chosen] = weights.view(torch.float32)
        case Tier.FP16:
            found.x[chosen] = weights.view(torch.float16).float()
        case Tier.INT8:
            found.x[chosen] = scale * weights.view(torch.int8).float()
        case _:
            found.x[chosen] = scale * unpack_int4(weights)
    if found.vectors:
        start = state_offset(tier, table.dim)
        kind = torch.float32 if tier is Tier.FP32 else torch.bfloat16
        size = table.dim * kind.itemsize
        for number, vector in enumerate(found.vectors):
            begin = start + number * size
            vector[chosen] = raw[:, begin : begin + size].contiguous().view(kind).float()


def _encode(
    table: TieredTable,
    tier: Tier,
    x: Tensor,
    vectors: Sequence[Tensor],
    old_scale: Tensor,
    noise: Noise | None,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Records [k, record bytes] and their scales [k]."""
    raw = torch.zeros(len(x), table.record_bytes(tier), dtype=torch.uint8, device=table.device)
    bits = None if noise is None or tier is Tier.FP32 else noise.bits(chosen, WEIGHTS)
    scale = torch.zeros(len(x), device=table.device)
    if tier in LEVELS:
        scale = kept_scale(x, old_scale, tier)
        q = quantised(x, scale, tier, bits)
        weights = pack_int4(q) if tier is Tier.INT4 else q.to(torch.int8).view(torch.uint8)
    else:
        weights = (x if tier is Tier.FP32 else to_fp16(x, bits)).contiguous().view(torch.uint8)
    raw[:, : weights.shape[1]] = weights
    begin = state_offset(tier, table.dim)
    for number, vector in enumerate(vectors):
        if tier is not Tier.FP32:
            vector = to_bf16(vector, None if noise is None else noise.bits(chosen, FIRST_STATE + number))
        state = vector.contiguous().view(torch.uint8)
        raw[:, begin : begin + state.shape[1]] = state
        begin += state.shape[1]
    return raw, scale
