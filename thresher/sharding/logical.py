"""The one view that TorchRec and torch have of a table with tiers: a tensor of fp32 without memory of its own.

    LogicalRows([window of table, window of table, ...])    windows lie one below the other: [sum of rows, columns]

Reading decodes rows, a block at a time where the result allows it. Writing encodes them to nearest: rows keep their
tier, rows never updated get the table's entry tier, optimizer vectors become 0. Only whole values can be written
(``copy_``) or rows filled anew (``uniform_``, ``normal_``, ``fill_``, ``zero_``); any other change in place is refused.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.utils._pytree import tree_map

from thresher.embeddings.kernels.backend import pick_backend
from thresher.embeddings.rows.tiered import HIGH, TieredTable
from thresher.embeddings.rows.tiers import STORED, Tier, state_bytes, state_offset, weight_bytes
from thresher.errors import PlanError

BLOCK_ROWS = 1 << 14
_aten = torch.ops.aten
_FILLS = (_aten.uniform_.default, _aten.normal_.default, _aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor)


@dataclass(frozen=True)
class Window:
    """Rows ``first`` to ``first + count`` of a shard."""

    table: TieredTable
    first: int
    count: int

    def read(self) -> Tensor:
        """[count, columns] fp32."""
        rows = torch.arange(self.first, self.first + self.count, device=self.table.device)
        return pick_backend(self.table.device).read(self.table, rows)

    def write(self, values: Tensor) -> None:
        """Stores [count, columns] fp32 in the rows' tiers."""
        table = self.table
        rows = torch.arange(self.first, self.first + self.count, device=table.device)
        tier = table.tier_of()[rows]
        stored = torch.isin(tier, torch.tensor([int(kind) for kind in STORED], device=table.device))
        tiers = torch.where(stored, tier, int(table.entry))
        pick_backend(table.device).write(table, rows, values.to(table.device, torch.float32), tiers)


class LogicalRows(Tensor):
    """Rows of tables with tiers as a tensor [rows, columns].

    Raises:
        PlanError: it is changed in place otherwise than above.
    """

    windows: tuple[Window, ...]

    @staticmethod
    def __new__(cls: type["LogicalRows"], windows: Sequence[Window]) -> "LogicalRows":
        table = windows[0].table
        shape = (sum(window.count for window in windows), table.dim)
        rows: LogicalRows = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=table.device)
        rows.windows = tuple(windows)
        return rows

    def __init__(self, windows: Sequence[Window]) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0]
        if func in _HANDLERS and isinstance(first, LogicalRows):
            found = _HANDLERS[func](*args)
            if found is not NotImplemented:
                return found
        if func is _aten.copy_.default:
            return _copy(*args)
        if func in _FILLS:
            return _fill(func, *args, **(kwargs or {}))
        if func._schema.is_mutable and isinstance(first, LogicalRows):
            raise PlanError(
                f"{func} would change rows with tiers in place",
                where=f"table '{first.windows[0].table.path}'",
                fix="copy whole values with copy_, or train without tiers for this table",
            )
        return func(*tree_map(_decoded, args), **tree_map(_decoded, dict(kwargs or {})))

    def read(self) -> Tensor:
        """A plain tensor of all rows."""
        values = torch.empty(self.shape, device=self.device)
        for start, window in self.blocks():
            values[start : start + window.count] = window.read()
        return values

    def blocks(self) -> Iterator[tuple[int, Window]]:
        """Windows of at most ``BLOCK_ROWS`` rows, each with its first row in this tensor."""
        start = 0
        for window in self.windows:
            for first in range(window.first, window.first + window.count, BLOCK_ROWS):
                count = min(BLOCK_ROWS, window.first + window.count - first)
                yield start, Window(window.table, first, count)
                start += count

    def is_finite(self) -> bool:
        """Whether the records of the tables behind the windows hold finite numbers only; decodes nothing."""
        return all(_is_finite(table) for table in dict.fromkeys(window.table for window in self.windows))

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        """A plain tensor in CPU memory."""
        return self.read().cpu()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.read().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"LogicalRows({self.windows[0].table.path}, {tuple(self.shape)})"


def is_finite(weights: Tensor) -> bool:
    """Whether a parameter holds finite numbers only."""
    if isinstance(weights, LogicalRows):
        return weights.is_finite()
    # In float64 finite floats do not add up to infinity; what is not finite stays so in a sum.
    return math.isfinite(float(weights.detach().sum(dtype=torch.float64)))


def _is_finite(table: TieredTable) -> bool:
    scales = table.desc[:, 1].contiguous().view(torch.float32)
    return bool(scales.isfinite().all()) and all(
        bool(part.isfinite().all()) for tier in table.stored_levels for part in _numbers(table, tier)
    )


def _numbers(table: TieredTable, tier: Tier) -> Iterator[Tensor]:
    """Floats in the records of a tier, [slots, numbers] each: weights of fp16 and fp32, and optimizer vectors."""
    size, start = table.record_bytes(tier), state_offset(tier, table.dim)
    records = table.slabs[tier][: int(table.count[tier, HIGH]) * size].view(-1, size)
    weights = {Tier.FP32: torch.float32, Tier.FP16: torch.float16}.get(tier)
    for block in torch.split(records, BLOCK_ROWS):
        if weights is not None:
            yield block[:, : weight_bytes(tier, table.dim)].contiguous().view(weights)
        vectors = block[:, start : start + state_bytes(tier, table.dim, table.n_vectors)].contiguous()
        yield vectors.view(torch.float32 if tier is Tier.FP32 else torch.bfloat16)


def own_rows(tables: nn.ModuleDict, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """Replaces what tables with tiers would be given of themselves, by tensors without memory.

    TorchRec would join column shards of a table on a rank to one plain tensor, only to copy every row onto itself.

    Returns:
        What to put back in its place.
    """
    kept: dict[str, Tensor] = {}
    for name, module in tables.items():
        own, given = module.weight, state_dict.get(f"{prefix}{name}.weight")
        if isinstance(own, LogicalRows) and isinstance(given, ShardedTensor):
            parts = [shard.tensor for shard in given.local_shards()]
            if tuple(w for part in parts if isinstance(part, LogicalRows) for w in part.windows) == own.windows:
                kept[f"{prefix}{name}.weight"] = _same(own)
                state_dict[f"{prefix}{name}.weight"] = torch.empty(tuple(given.metadata().size), device="meta")
    return kept


def _decoded(value: Any) -> Any:
    return value.read() if isinstance(value, LogicalRows) else value


def _same(rows: LogicalRows) -> LogicalRows:
    return LogicalRows(rows.windows)


def _view(rows: LogicalRows, shape: Sequence[int]) -> Any:
    known = [size if size >= 0 else -1 for size in shape]
    same = len(known) == 2 and all(size in (-1, own) for size, own in zip(known, rows.shape, strict=True))
    return _same(rows) if same else NotImplemented


def _slice(rows: LogicalRows, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    begin, stop, _ = slice(start, end).indices(rows.shape[dim])
    if step != 1 or (dim % 2 == 1 and (begin, stop) != (0, rows.shape[1])) or stop <= begin:
        return NotImplemented
    if dim % 2 == 1:
        return _same(rows)
    kept, place = [], 0
    for window in rows.windows:
        low, high = max(begin - place, 0), min(stop - place, window.count)
        if low < high:
            kept.append(Window(window.table, window.first + low, high - low))
        place += window.count
    return LogicalRows(kept)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, LogicalRows):
        if isinstance(source, LogicalRows) and source.windows == target.windows:
            return target
        values = source if source.shape == target.shape else _decoded(source).expand(target.shape)
        for start, window in target.blocks():
            window.write(_decoded(values[start : start + window.count]))
    elif isinstance(source, LogicalRows) and target.shape == source.shape:
        for start, window in source.blocks():
            target[start : start + window.count].copy_(window.read())
    else:
        target.copy_(_decoded(source))
    return target


def _fill(func: Any, target: LogicalRows, *args: Any, **kwargs: Any) -> LogicalRows:
    for _, window in target.blocks():
        values = torch.empty(window.count, target.shape[1], device=target.device)
        window.write(func(values, *args, **kwargs))
    return target


_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.view.default: _view,
    _aten.slice.Tensor: _slice,
    _aten.is_pinned.default: lambda rows, device=None: False,
}
