"""Where blocks of tiered rows come from and go to while DCP writes and reads a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from thresher.embeddings.init import fill
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.sharding.tier_blocks import Block, block_ranges, decoded, encoded, put_block, rows_of, take_block
from thresher.sharding.tier_columns import cut, encode, joined


@runtime_checkable
class Destination(Protocol):
    """What a checkpoint is read into besides tensors: asked for memory, then told that it is filled."""

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]: ...

    def memory(self, index: MetadataIndex) -> Tensor:
        """The whole chunk that ``index`` names."""

    def commit(self, part: Tensor) -> None:
        """``part``, some of the memory handed out, is filled."""


@dataclass(frozen=True)
class Outgoing:
    """A block of a table as DCP writes it: encoded when its turn comes."""

    table: TieredTable
    first: int
    rows: int
    nbytes: int

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        size, start = torch.Size([self.nbytes]), torch.Size([0])
        data = TensorWriteData(ChunkStorageMetadata(start, size), TensorProperties(dtype=torch.uint8), size)
        return [WriteItem(MetadataIndex(fqn, start), WriteItemType.TENSOR, tensor_data=data)]

    def encoded(self) -> Tensor:
        """[nbytes] uint8."""
        return encoded(take_block(self.table, self.first, self.rows), self.first)


class Target(Protocol):
    """A rectangle of a table on this rank that takes blocks in."""

    row0: int
    rows: int
    col0: int
    cols: int

    def begin(self) -> None:
        """Forgets what it held; done once, before the first block."""

    def put(self, block: Block) -> None:
        """Takes rows of the rectangle, of its columns."""


class TieredTarget:
    def __init__(self, table: TieredTable) -> None:
        self._table = table
        self.row0, self.rows, self.col0, self.cols = table.row0, table.rows, table.col0, table.dim

    def begin(self) -> None:
        for memory in (self._table.desc, self._table.stat, self._table.count):
            memory.zero_()
        for tier in self._table.stored_levels:
            self._table.trim(tier)

    def put(self, block: Block) -> None:
        put_block(self._table, block)
        self._table.unload()


class FlatTarget:
    """Part of a flat table [rows, cols]; rows that no block names get their initial values."""

    def __init__(self, part: Tensor, row0: int, col0: int, path: str, facts: Mapping[str, Any]) -> None:
        self._part, self._path, self._facts = part, path, facts
        self.row0, self.col0 = row0, col0
        self.rows, self.cols = part.shape

    def begin(self) -> None:
        seed, dim, scale = self._facts["seed"], self._facts["dim"], self._facts["init_scale"]
        fill(self._part, seed, self._path, dim, scale, self.row0, self.col0)

    def put(self, block: Block) -> None:
        updated = block.only(block.tier != Tier.NONE)
        with torch.no_grad():
            self._part[updated.rows - self.row0] = rows_of(updated).to(self._part)


class Once:
    """Begins a target before its first block."""

    def __init__(self, target: Target) -> None:
        self.target, self._begun = target, False

    def begun(self) -> Target:
        if not self._begun:
            self._begun = True
            self.target.begin()
        return self.target


class Pending:
    """Rows of a target whose columns come from several blocks."""

    def __init__(self, once: Once, columns: Sequence[tuple[int, int]]) -> None:
        self._once, self._columns = once, sorted(columns)
        self._found: dict[int, Block] = {}

    def take(self, block: Block, col0: int) -> None:
        target = self._once.target
        first, last = max(target.col0 - col0, 0), min(target.col0 + target.cols - col0, block.columns)
        self._found[col0] = cut(block.within(target.row0, target.row0 + target.rows), first, last)
        if len(self._found) == len(self._columns):
            whole = joined([self._found.pop(col) for col, _ in self._columns])
            self._once.begun().put(whole)


class Incoming:
    """A block in the checkpoint, for the targets that need some of it."""

    def __init__(self, first: int, col0: int, size: torch.Size, pending: Sequence[Pending]) -> None:
        self._first, self._col0, self._size, self._pending = first, col0, size, pending

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0]), self._size)]

    def memory(self, index: MetadataIndex) -> Tensor:
        return torch.empty(self._size, dtype=torch.uint8)

    def commit(self, part: Tensor) -> None:
        block = decoded(part, self._first)
        for pending in self._pending:
            pending.take(block, self._col0)


class Rectangles:
    """fp32 weights in the checkpoint, for tables with tiers; one shard at a time is in memory where files allow it."""

    def __init__(self, targets: Sequence[tuple[Once, TieredTable]]) -> None:
        self._targets = targets
        self._memory: dict[int, Tensor] = {}
        self._missing = [once.target.rows * once.target.cols for once, _ in targets]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        shapes = [once.target for once, _ in self._targets]
        return [ChunkStorageMetadata(torch.Size([t.row0, t.col0]), torch.Size([t.rows, t.cols])) for t in shapes]

    def memory(self, index: MetadataIndex) -> Tensor:
        assert index.index is not None
        target = self._targets[index.index][0].target
        return self._memory.setdefault(index.index, torch.empty(target.rows, target.cols))

    def commit(self, part: Tensor) -> None:
        number = next(n for n, memory in self._memory.items() if memory.data_ptr() == part.untyped_storage().data_ptr())
        self._missing[number] -= part.numel()
        if self._missing[number] == 0:
            once, table = self._targets[number]
            _enter(once.begun(), table, self._memory.pop(number))


def _enter(target: Target, table: TieredTable, weights: Tensor) -> None:
    """Stores fp32 ``weights`` in the entry tier of ``table``."""
    for first, count in block_ranges(table.row0, table.rows):
        values = weights[first - table.row0 : first - table.row0 + count]
        raw, scale = encode(values, torch.zeros(count, table.n_vectors, table.dim), table.entry)
        none = torch.zeros(count)
        tier = torch.full((count,), int(table.entry))
        rows = torch.arange(first, first + count)
        target.put(Block(rows, tier, none, none, scale, {table.entry: raw}, table.dim, table.n_vectors))
