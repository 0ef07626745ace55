"""Rows of tables with tiers as bytes: what a checkpoint holds of them, and back.

A block is up to 65,536 rows of a shard. Rows that were never updated leave nothing in it; a block of such rows alone
does not exist. All numbers little-endian, every part padded to 4 bytes:

    format 1, n, columns, vectors, scalars       5 x int32
    row                                          n x uint16, counted from the block's first row, ascending
    tier                                         n x uint8
    scalar                                       n x fp32, where the optimizer keeps one
    priority x gain                              n x fp32
    scale                                        fp32 of the rows in int4 and int8, in order of rows
    records                                      all of int4, all of int8, ..., each in order of rows (tiers.py)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embeddings.kernels.records import take_slots
from thresher.embeddings.rows.rounding import pack_int4, unpack_int4
from thresher.embeddings.rows.tiered import SLOT_BITS, SLOT_MASK, TieredTable
from thresher.embeddings.rows.tiers import LEVELS, STORED, Tier, record_bytes, state_offset, weight_bytes

BLOCK_ROWS = 1 << 16
_FORMAT = 1
_HEADER = 5


@dataclass(frozen=True)
class Block:
    """Rows that were updated, of a rectangle of a table, ascending.

    Attributes:
        rows: [n] int64 rows of the whole table.
        tier: [n] int64.
        scalar: [n] fp32 of the optimizer, or empty.
        priority: [n] fp32, times gain.
        scale: [n] fp32, 0 for tiers without one.
        records: [k, record bytes] uint8 by tier, in the order of the rows of that tier.
        columns, vectors: of the records.
    """

    rows: Tensor
    tier: Tensor
    scalar: Tensor
    priority: Tensor
    scale: Tensor
    records: dict[Tier, Tensor]
    columns: int
    vectors: int

    def within(self, first: int, last: int) -> "Block":
        """The rows from ``first`` up to but not including ``last``."""
        if not len(self.rows) or (int(self.rows[0]) >= first and int(self.rows[-1]) < last):
            return self
        return self.only((self.rows >= first) & (self.rows < last))

    def only(self, kept: Tensor) -> "Block":
        """The rows where ``kept`` [n] is true."""
        records = {tier: raw[kept[self.tier == tier]] for tier, raw in self.records.items()}
        scalar = self.scalar[kept] if len(self.scalar) else self.scalar
        of_rows = (self.rows[kept], self.tier[kept], scalar, self.priority[kept], self.scale[kept])
        return Block(*of_rows, {tier: raw for tier, raw in records.items() if len(raw)}, self.columns, self.vectors)


def block_ranges(row0: int, rows: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the blocks of a shard; they start at multiples of 65,536 but for the first."""
    for start in range(row0 - row0 % BLOCK_ROWS, row0 + rows, BLOCK_ROWS):
        first = max(start, row0)
        yield first, min(start + BLOCK_ROWS, row0 + rows) - first


def take_block(table: TieredTable, first: int, count: int) -> Block:
    """The updated ones of ``count`` rows from row ``first`` of the whole table on, on the CPU."""
    local = slice(first - table.row0, first - table.row0 + count)
    desc, stat = table.desc[local], table.stat[local]
    kept = ((desc[:, 0] >> SLOT_BITS) & 7).bool() | (stat != 0).any(1)
    chosen = kept.nonzero()[:, 0]
    place = desc[chosen, 0].to(torch.int64)
    tier, slot = (place >> SLOT_BITS) & 7, place & SLOT_MASK
    records = {}
    for level in table.stored_levels:
        here = slot[tier == level]
        if len(here):
            size = table.record_bytes(level)
            records[level] = table.slabs[level].view(-1, size)[here].cpu()
    scale = torch.where(_has_scale(tier), desc[chosen, 1].contiguous().view(torch.float32), 0.0)
    scalar = stat[chosen, 0] if table.has_scalar else torch.zeros(0)
    priority = stat[chosen, 1].cpu()
    of_rows = ((chosen + first).cpu(), tier.cpu(), scalar.cpu(), priority, scale.cpu())
    return Block(*of_rows, records, table.dim, table.n_vectors)


def encoded_size(table: TieredTable, first: int, count: int) -> int:
    """Bytes of :func:`encoded` of these rows; 0 where none was updated."""
    local = slice(first - table.row0, first - table.row0 + count)
    tier = (table.desc[local, 0] >> SLOT_BITS) & 7
    n = int((tier.bool() | (table.stat[local] != 0).any(1)).sum())
    if n == 0:
        return 0
    by_tier: list[int] = torch.bincount(tier, minlength=len(Tier)).tolist()
    records = sum(by_tier[level] * table.record_bytes(level) for level in table.stored_levels)
    scales = sum(by_tier[level] for level in LEVELS)
    return _HEADER * 4 + _padded(2 * n) + _padded(n) + 4 * (n * (1 + table.has_scalar) + scales) + records


def encoded(block: Block, first: int) -> Tensor:
    """[bytes] uint8 of a block whose first row is ``first`` (whether it was updated or not)."""
    n = len(block.rows)
    header = torch.tensor([_FORMAT, n, block.columns, block.vectors, len(block.scalar) > 0], dtype=torch.int32)
    parts = [
        header,
        (block.rows - first).to(torch.int32).to(torch.int16),
        block.tier.to(torch.uint8),
        block.scalar,
        block.priority,
        block.scale[_has_scale(block.tier)],
        *(block.records[tier] for tier in STORED if tier in block.records),
    ]
    raw = [part.contiguous().view(torch.uint8).flatten() for part in parts]
    return torch.cat([torch.nn.functional.pad(part, (0, _padded(len(part)) - len(part))) for part in raw])


def decoded(data: Tensor, first: int) -> Block:
    """The block whose first row is ``first``."""
    reader = _Reader(data)
    _, n, columns, vectors, scalars = reader.take(_HEADER, torch.int32).tolist()
    rows = (reader.take(n, torch.int16).to(torch.int64) & 0xFFFF) + first
    tier = reader.take(n, torch.uint8).to(torch.int64)
    scalar, priority = reader.take(n * scalars, torch.float32), reader.take(n, torch.float32)
    scaled = _has_scale(tier)
    scale = torch.zeros(n)
    scale[scaled] = reader.take(int(scaled.sum()), torch.float32)
    records = {}
    for level in STORED:
        count, size = int((tier == level).sum()), record_bytes(level, columns, vectors)
        if count:
            records[level] = reader.take(count * size, torch.uint8).view(count, size)
    return Block(rows, tier, scalar, priority, scale, records, columns, vectors)


def put_block(table: TieredTable, block: Block) -> None:
    """Stores a block of exactly the table's columns and optimizer in rows that hold nothing yet."""
    rows = (block.rows - table.row0).to(table.device)
    slot = torch.zeros(len(rows), dtype=torch.int64, device=table.device)
    tier = block.tier.to(table.device)
    for level, raw in block.records.items():
        taken = take_slots(table, level, len(raw))
        table.slabs[level].view(-1, table.record_bytes(level))[taken] = raw.to(table.device)
        slot[tier == level] = taken
    place = (tier << SLOT_BITS | slot).to(torch.int32)
    table.desc[rows] = torch.stack([place, block.scale.to(table.device).view(torch.int32)], dim=1)
    if len(block.scalar):
        table.stat[rows, 0] = block.scalar.to(table.device)
    table.stat[rows, 1] = block.priority.to(table.device)


def rows_of(block: Block) -> Tensor:
    """[n, columns] fp32 values; rows without a record are zeros."""
    values = torch.zeros(len(block.rows), block.columns)
    for tier, raw in block.records.items():
        chosen = block.tier == tier
        values[chosen] = _values(numbers_of(raw, tier, block.columns), block.scale[chosen])
    return values


def numbers_of(records: Tensor, tier: Tier, columns: int) -> Tensor:
    """[k, columns] weights as they are stored: fp32, fp16, or int8 for both int8 and int4."""
    raw = records[:, : weight_bytes(tier, columns)].contiguous()
    match tier:
        case Tier.FP32:
            return raw.view(torch.float32)
        case Tier.FP16:
            return raw.view(torch.float16)
        case Tier.INT8:
            return raw.view(torch.int8)
    return unpack_int4(raw).to(torch.int8)


def state_of(records: Tensor, tier: Tier, columns: int, vectors: int) -> Tensor:
    """[k, vectors, columns] optimizer vectors as they are stored: fp32 or bf16."""
    kind = torch.float32 if tier is Tier.FP32 else torch.bfloat16
    begin = state_offset(tier, columns)
    raw = records[:, begin : begin + vectors * columns * kind.itemsize].contiguous()
    return raw.view(kind).view(len(records), vectors, columns)


def records_of(numbers: Tensor, state: Tensor, tier: Tier) -> Tensor:
    """[k, record bytes] from what :func:`numbers_of` and :func:`state_of` give."""
    count, columns = numbers.shape
    raw = torch.zeros(count, record_bytes(tier, columns, state.shape[1]), dtype=torch.uint8)
    weights = pack_int4(numbers) if tier is Tier.INT4 else numbers.contiguous().view(torch.uint8)
    raw[:, : weights.shape[1]] = weights
    vectors = state.contiguous().view(count, -1)
    if vectors.numel():
        begin, size = state_offset(tier, columns), vectors.shape[1] * vectors.itemsize
        raw[:, begin : begin + size] = vectors.view(torch.uint8)
    return raw


def _values(numbers: Tensor, scale: Tensor) -> Tensor:
    return numbers.float() * scale.unsqueeze(1) if numbers.dtype == torch.int8 else numbers.float()


def _has_scale(tier: Tensor) -> Tensor:
    return (tier == Tier.INT4) | (tier == Tier.INT8)


def _padded(size: int) -> int:
    return -(-size // 4) * 4


class _Reader:
    """Takes padded parts off a block's bytes."""

    def __init__(self, data: Tensor) -> None:
        self._data, self._at = data, 0

    def take(self, count: int, kind: torch.dtype) -> Tensor:
        size = count * kind.itemsize
        part = self._data[self._at : self._at + size].view(kind)
        self._at += _padded(size)
        return part
