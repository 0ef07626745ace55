"""Tables as rows of whole numbers that kernels read: where everything is, and how wide.

A row has a number for each name below; those ending in a six-fold one have six, one for each number of a tier. A flat
table reads as a tiered one whose rows are all FP32 and stand in slots of their own number.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from thresher.embeddings.init import init_key
from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.kernels.gpu.kernel import block_of, jit
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.generator import STEP64, table_key
from thresher.embeddings.rows.tiered import FREE, HIGH, TieredTable
from thresher.embeddings.rows.tiers import Tier, state_bytes, state_offset

DIM = tl.constexpr(0)
FULL_DIM = tl.constexpr(1)
DESC = tl.constexpr(2)  # 0 for a flat table
STAT = tl.constexpr(3)  # 0 where no number is kept for a row
STAT_BYTES = tl.constexpr(4)  # from one row's to the next
KNOWN = tl.constexpr(5)  # address of ``identity``, or 0
ROW0 = tl.constexpr(6)
COL0 = tl.constexpr(7)
ROUND_KEY = tl.constexpr(8)
INIT_LOW = tl.constexpr(9)
INIT_HIGH = tl.constexpr(10)
INIT_SCALE = tl.constexpr(11)  # bits of the fp32
ENTRY = tl.constexpr(12)
LEVELS = tl.constexpr(13)  # bit t is set for tier t
WEIGHTS = tl.constexpr(16)  # six: address of slot 0
STRIDE = tl.constexpr(22)  # six: bytes from one slot to the next
FIRST = tl.constexpr(28)  # six: address of the first optimizer vector of slot 0
SECOND = tl.constexpr(34)  # six: of the second
STATE_STRIDE = tl.constexpr(40)  # six
STACK = tl.constexpr(46)  # six: address of the free stack
WIDTH = tl.constexpr(52)

STEP = tl.constexpr(0)  # step x STEP64
TOPS = tl.constexpr(1)  # six: slots ever used
SPARE = tl.constexpr(7)  # six: slots on the free stack
ROOM = tl.constexpr(13)  # six: slots that can be taken
COUNTS = tl.constexpr(19)

_TIERS = len(Tier)
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Layout:
    """Tables of one call, as kernels see them.

    Attributes:
        numbers: [tables, WIDTH] int64, as above.
        block, rows: columns and rows of a tile.
        levels: bit t is set if a row of tier t can occur.
        align: at most 16; divides every table's width, and the address of every record's weights and vectors.
        tiered: whether any table has tiers.
    """

    numbers: Tensor
    block: int
    rows: int
    levels: int
    align: int
    tiered: bool


def layout_of(tables: Sequence[Table], tile: int) -> Layout:
    """The layout of ``tables``, all on one device, with tiles of about ``tile`` numbers."""
    numbers = [_tiered(table) if isinstance(table, TieredTable) else _flat(table) for table in tables]
    levels = align = 0
    for row in numbers:
        levels |= row[LEVELS.value]
        align = math.gcd(align, row[DIM.value])
        for first in (WEIGHTS, STRIDE, FIRST, SECOND, STATE_STRIDE):
            align = math.gcd(align, *row[first.value : first.value + _TIERS])
    block = block_of(max(table.dim for table in tables))
    return Layout(
        numbers=torch.tensor(numbers, dtype=torch.int64).to(tables[0].device),
        block=block,
        rows=max(1, tile // block),
        levels=levels,
        align=math.gcd(align, 16),
        tiered=any(isinstance(table, TieredTable) for table in tables),
    )


def counts_of(tables: Sequence[Table]) -> Tensor:
    """[tables, COUNTS] int64: what changes with every update."""
    rows = []
    for table in tables:
        row = [_signed(table.step * STEP64)] + [0] * (COUNTS.value - 1)
        if isinstance(table, TieredTable):
            for tier in table.stored_levels:
                high, free = table.count[tier].tolist()
                row[TOPS.value + tier], row[SPARE.value + tier] = high, free
                row[ROOM.value + tier] = table.slots[tier] - high + free
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).to(tables[0].device)


def settle(table: TieredTable, taken: Sequence[int], freed: Sequence[int]) -> None:
    """Counts the slots, by number of the tier, that were taken and then freed on the device."""
    for tier in table.stored_levels:
        reused = min(taken[tier], int(table.count[tier, FREE]))
        table.count[tier, FREE] += freed[tier] - reused
        table.count[tier, HIGH] += taken[tier] - reused


@jit
def field(numbers: tl.tensor, table: tl.tensor, name: tl.tensor) -> tl.tensor:
    """Number ``name`` of each table."""
    return tl.load(numbers + table * WIDTH + name)


@jit
def count(counts: tl.tensor, table: tl.tensor, name: tl.tensor) -> tl.tensor:
    """Number ``name`` of each table, of those that change."""
    return tl.load(counts + table * COUNTS + name)


def _flat(table: FlatTable) -> list[int]:
    row = [0] * WIDTH.value
    row[DIM.value], row[FULL_DIM.value] = table.dim, table.full_dim
    row[LEVELS.value] = 1 << Tier.FP32
    row[WEIGHTS.value + Tier.FP32] = table.weights.data_ptr()
    row[STRIDE.value + Tier.FP32] = row[STATE_STRIDE.value + Tier.FP32] = table.dim * 4
    if table.scalar.numel():
        row[STAT.value], row[STAT_BYTES.value] = table.scalar.data_ptr(), 4
    for name, vector in zip((FIRST, SECOND), table.vectors, strict=False):
        row[name.value + Tier.FP32] = vector.data_ptr()
    return row


def _tiered(table: TieredTable) -> list[int]:
    row = [0] * WIDTH.value
    key = init_key(table.seed, table.path)
    row[: LEVELS.value + 1] = [
        table.dim,
        table.full_dim,
        table.desc.data_ptr(),
        table.stat.data_ptr(),
        8,
        0 if table.identity is None else table.identity.data_ptr(),
        table.row0,
        table.col0,
        table_key(table.seed, table.path),
        _signed(key),
        _signed(key >> 64),
        struct.unpack("<i", struct.pack("<f", table.init_scale))[0],
        int(table.entry),
        sum(1 << tier for tier in table.levels) | 1 << Tier.NONE,
    ]
    for tier in table.stored_levels:
        slab, stride = table.slabs[tier].data_ptr(), table.record_bytes(tier)
        state = slab + state_offset(tier, table.dim)
        row[WEIGHTS.value + tier] = slab
        row[STRIDE.value + tier] = row[STATE_STRIDE.value + tier] = stride
        row[FIRST.value + tier] = state
        row[SECOND.value + tier] = state + state_bytes(tier, table.dim, 1)
        row[STACK.value + tier] = table.free[tier].data_ptr()
    return row


def _signed(value: int) -> int:
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value
