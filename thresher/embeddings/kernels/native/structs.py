"""Tables and lookups as the structures of abi.h. Addresses are only good while the tensors behind them live."""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from thresher.embeddings.init import init_key
from thresher.embeddings.kernels.backend import Sorted, Table
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.native.library import BagsStruct, SortedStruct, TableStruct
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.generator import table_key
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import state_offset
from thresher.errors import BadIds

_WORD = 1 << 64
_MOST = 1 << 32
POOLINGS = {Pooling.SUM: 0, Pooling.MEAN: 1, Pooling.NONE: 2}


class TableStructs:
    """Structures of tables, made once for each table: only a few fields of them change."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Table, TableStruct] = WeakKeyDictionary()

    def one(self, table: Table) -> TableStruct:
        """The structure of a table as it is now."""
        known = self._known.get(table)
        if known is None:
            known = self._known[table] = _tiered(table) if isinstance(table, TieredTable) else _flat(table)
        known.step = table.step
        if isinstance(table, FlatTable):
            known.weights = table.weights.data_ptr()
        elif table.identity is not None:
            known.identity = table.identity.data_ptr()
        return known

    def array(self, tables: Sequence[Table]) -> "ctypes.Array[TableStruct]":
        """Structures of several tables, one after the other."""
        return (TableStruct * len(tables))(*[self.one(table) for table in tables])


def _flat(table: FlatTable) -> TableStruct:
    struct = TableStruct(rows=table.rows, dim=table.dim, full_dim=table.full_dim)
    if table.scalar.numel():
        struct.scalar = table.scalar.data_ptr()
    for number, vector in enumerate(table.vectors):
        struct.vectors[number] = vector.data_ptr()
    struct.n_vectors, struct.has_scalar = len(table.vectors), table.scalar.numel() > 0
    return struct


def _tiered(table: TieredTable) -> TableStruct:
    struct = TableStruct(rows=table.rows, dim=table.dim, full_dim=table.full_dim)
    struct.desc, struct.stat, struct.count = (t.data_ptr() for t in (table.desc, table.stat, table.count))
    for tier in table.stored_levels:
        struct.slabs[tier], struct.free[tier] = table.slabs[tier].data_ptr(), table.free[tier].data_ptr()
        struct.slots[tier], struct.record_bytes[tier] = table.slots[tier], table.record_bytes(tier)
        struct.state_offset[tier] = state_offset(tier, table.dim)
    struct.row0, struct.col0 = table.row0, table.col0
    key = init_key(table.seed, table.path)
    struct.init_key[:] = (key % _WORD, key // _WORD)
    struct.round_key = table_key(table.seed, table.path) % _WORD
    struct.init_scale, struct.entry = table.init_scale, table.entry
    struct.n_vectors, struct.has_scalar = table.n_vectors, table.has_scalar
    return struct


def require_numbered(bags: Bags) -> None:
    """Raises :class:`BadIds` where ids or bags are too many for numbers of 32 bits."""
    for name, size in (("ids", bags.ids.numel()), ("bags", bags.first_bags[-1])):
        if size >= _MOST:
            raise BadIds(f"{size} {name} in one lookup, {_MOST - 1} at most", fix="give smaller batches")


class BagsCall:
    """A lookup as a structure, and the tensors that it points into.

    Args:
        dims: columns of each table.

    Attributes:
        struct: see abi.h.
        shape: of the output.
    """

    def __init__(self, bags: Bags, dims: Sequence[int]) -> None:
        widths = [dims[table] for table in bags.tables]
        self.shape, starts, strides = _layout(bags, widths)
        numbers = [*bags.first_bags, *starts, *strides]
        features = len(bags.tables)
        self._tensors = [tensor.contiguous() for tensor in (bags.ids, bags.offsets)]
        weights = None if bags.weights is None else bags.weights.detach().contiguous()
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self._tables = (ctypes.c_int32 * features)(*bags.tables)
        self._weights = weights
        first = ctypes.addressof(self._numbers)
        ids, offsets = self._tensors
        self.struct = BagsStruct(
            ids=ids.data_ptr(),
            offsets=offsets.data_ptr(),
            weights=None if weights is None else weights.data_ptr(),
            tables=ctypes.addressof(self._tables),
            first_bag=first,
            start=first + 8 * (features + 1),
            stride=first + 8 * (2 * features + 1),
            n=ids.numel(),
            features=features,
            wide_ids=ids.dtype == torch.int64,
            pooling=POOLINGS[bags.pooling],
            n_tables=len(dims),
        )


def _layout(bags: Bags, widths: Sequence[int]) -> tuple[tuple[int, ...], list[int], Sequence[int]]:
    """Shape of the output; where the vectors of each feature start in it, and their distances."""
    if bags.pooling is Pooling.NONE:
        return (bags.ids.numel(), widths[0] if widths else 0), [0] * len(widths), widths
    sizes = widths if bags.is_uniform else [n * width for n, width in zip(bags.batch, widths, strict=True)]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    total = starts.pop()
    if bags.is_uniform:
        return (bags.batch[0] if bags.batch else 0, total), starts, [total] * len(widths)
    return (total,), starts, widths


class Found:
    """The handle of :class:`Sorted`: what the C++ side filled in, and the call it belongs to.

    Attributes:
        call: the lookup.
        tables: their structures as they were when the rows were found.
        struct: see abi.h.
    """

    def __init__(self, call: BagsCall, tables: "ctypes.Array[TableStruct]", weighted: bool, pooled: bool) -> None:
        n, n_tables = call.struct.n, len(tables)
        self.call, self.tables, self._n_tables = call, tables, n_tables
        self._counts = (ctypes.c_int64 * (2 * n_tables + 1))()
        self._rows = torch.empty(n, dtype=torch.int64)
        # segments [n + tables], payload [n] and, where positions have to be turned into bags, those [n]
        self._places = torch.empty((3 if weighted and pooled else 2) * n + n_tables, dtype=torch.int32)
        segments = self._places.data_ptr()
        payload = segments + 4 * (n + n_tables)
        self.struct = SortedStruct(
            first=ctypes.addressof(self._counts),
            unique=ctypes.addressof(self._counts) + 8 * (n_tables + 1),
            rows=self._rows.data_ptr(),
            segments=segments,
            payload=payload,
            bag_of=payload + 4 * n if weighted and pooled else None,
            by_position=weighted or not pooled,
        )

    def unique(self) -> tuple[Tensor, ...]:
        """For each table its distinct rows [U] int64."""
        counts = list(self._counts)
        firsts, sizes = counts[: self._n_tables + 1], counts[self._n_tables + 1 :]
        cuts = [
            piece
            for size, (first, end) in zip(sizes, pairwise(firsts), strict=True)
            for piece in (size, end - first - size)
        ]
        return tuple(self._rows.split_with_sizes(cuts)[::2])

    def places(self, table: int) -> list[Tensor]:
        """For each distinct row of a table where it occurs: positions in the ids, or numbers of bags (see abi.h)."""
        first, size = self._counts[table], self._counts[self._n_tables + 1 + table]
        ends = self._places[first + table : first + table + size + 1].tolist()
        payload = self._places[self.call.struct.n + self._n_tables + first :]
        return [payload[start:end] for start, end in pairwise(ends)]


def found_of(found: Sorted) -> Found:
    """The handle of a sort of this backend."""
    assert isinstance(found.handle, Found), "sorted by another backend"
    return found.handle
