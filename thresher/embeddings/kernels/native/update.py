"""The half of the CPU backend that changes rows."""

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from typing import TypeVar

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import HISTOGRAM_BUCKETS, Sorted, Table, UpdateStats
from thresher.embeddings.kernels.checks import bad_gradient, tier_full
from thresher.embeddings.kernels.native.library import BAD_GRADIENT, OUT_OF_MEMORY, TIERS, ErrorStruct
from thresher.embeddings.kernels.native.structs import TableStructs, found_of
from thresher.embeddings.kernels.rules import RowOptimizerName, UpdateRule
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

RULES: tuple[RowOptimizerName, ...] = ("sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam", "ftrl")
"""In the order of update_abi.h."""
Kept = TypeVar("Kept")
_NO_DECAY, _L2, _DECOUPLED = range(3)
_NO_MEMORY = -2


class RuleStruct(ctypes.Structure):
    """``Rule`` of update_abi.h."""

    _fields_ = (
        ("kind", c_int32),
        ("decay", c_int32),
        *((name, c_float) for name in ("lr", "eps", "beta1", "rest1", "beta2", "rest2", "correction1", "correction2")),
        *((name, c_float) for name in ("ftrl_beta", "l1", "l2", "weight_decay", "shrink", "priority_gain")),
        ("promote_above", c_float * TIERS),
    )


class UpdateStruct(ctypes.Structure):
    """``Update`` of update_abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("tables", "bags", "sorted", "grad", "rules", "importance", "row_sums")),
        ("sums_out", c_void_p),
        ("threads", c_int64),
    )


class CountsStruct(ctypes.Structure):
    """``UpdateCounts`` of update_abi.h."""

    _fields_ = (("rows", c_int64), ("promoted", c_int64), ("refused", c_int64))


class NativeUpdates:
    """Updates and maintenance; see :class:`thresher.embeddings.kernels.backend.Backend`.

    Raises:
        MemoryError: in any call, if there is no memory for its work.
    """

    _functions: ctypes.CDLL
    _structs: TableStructs

    def row_sums(
        self, tables: Sequence[Table], found: Sorted, grad: Tensor, rules: Sequence[UpdateRule]
    ) -> list[Tensor]:
        """See the contract."""
        sums = [torch.empty(rows.numel()) for rows in found.unique]
        call = _Call(self._structs, tables, found, grad, rules)
        call.struct.sums_out = ctypes.addressof(call.keep(_addresses(sums)))
        _require_memory(self._functions.th_row_sums(byref(call.struct)))
        return sums

    def update(
        self,
        tables: Sequence[Table],
        found: Sorted,
        grad: Tensor,
        rules: Sequence[UpdateRule],
        importance: Tensor | None = None,
        row_sums: Sequence[Tensor] | None = None,
    ) -> UpdateStats:
        """See the contract."""
        call = _Call(self._structs, tables, found, grad, rules)
        if importance is not None:
            samples = max((importance.numel(), *found.bags.batch))
            call.struct.importance = call.keep(_plain(importance, torch.float32, samples)).data_ptr()
        if row_sums is not None:
            pairs = zip(row_sums, found.unique, strict=True)
            given = call.keep([_plain(total, torch.float32, len(rows)) for total, rows in pairs])
            call.struct.row_sums = ctypes.addressof(call.keep(_addresses(given)))
        counts, error = CountsStruct(), ErrorStruct()
        fault = self._functions.th_update(byref(call.struct), byref(counts), byref(error))
        if fault == BAD_GRADIENT:
            raise bad_gradient(tables[error.table], error.row)
        _require_memory(fault)
        return UpdateStats(counts.rows, counts.promoted, counts.refused)

    def write(self, table: TieredTable, rows: Tensor, values: Tensor, tiers: Tensor) -> None:
        """See the contract.

        Raises:
            PlanError: a tier has too few slots; nothing has been stored.
        """
        n = rows.numel()
        rows, tiers = (_plain(whole, torch.int64, n) for whole in (rows, tiers))
        values = _plain(values, torch.float32, n, table.dim)
        slots = (c_int64 * 2)()
        result = self._functions.th_write(
            byref(self._structs.one(table)),
            rows.data_ptr(),
            tiers.data_ptr(),
            values.data_ptr(),
            n,
            slots,
            torch.get_num_threads(),
        )
        if result >= 0:
            raise tier_full(table, Tier(result), *slots)
        _require_memory(OUT_OF_MEMORY if result == _NO_MEMORY else 0)

    def histogram(self, table: TieredTable) -> Tensor:
        """See the contract."""
        buckets = torch.zeros(HISTOGRAM_BUCKETS, dtype=torch.int64)
        self._functions.th_histogram(byref(self._structs.one(table)), table.gain, buckets.data_ptr())
        return buckets

    def demote(self, table: TieredTable, first: int, count: int, keep_from: Sequence[float]) -> int:
        """See the contract."""
        lower = [-1] * TIERS
        for level, below in zip(table.levels[1:], table.levels, strict=False):
            lower[level] = int(below)
        moved = self._functions.th_demote(
            byref(self._structs.one(table)),
            first,
            max(min(count, table.rows - first), 0),
            (c_float * TIERS)(*keep_from),
            (c_int32 * TIERS)(*lower),
            torch.get_num_threads(),
        )
        _require_memory(OUT_OF_MEMORY if moved < 0 else 0)
        return int(moved)

    def compact(self, table: TieredTable, tier: Tier) -> None:
        """See the contract."""
        self._functions.th_compact(byref(self._structs.one(table)), int(tier))
        table.trim(tier)


class _Call:
    """``Update`` of update_abi.h and everything that it points into."""

    def __init__(
        self, structs: TableStructs, tables: Sequence[Table], found: Sorted, grad: Tensor, rules: Sequence[UpdateRule]
    ) -> None:
        handle = found_of(found)
        known = {rule: _rule(rule) for rule in dict.fromkeys(rules)}
        self._kept: list[object] = [
            handle,
            array := structs.array(tables),
            grad := _plain(grad, torch.float32, *handle.call.shape),
            packed := (RuleStruct * len(rules))(*[known[rule] for rule in rules]),
        ]
        self.struct = UpdateStruct(
            tables=ctypes.addressof(array),
            bags=ctypes.addressof(handle.call.struct),
            sorted=ctypes.addressof(handle.struct),
            grad=grad.data_ptr(),
            rules=ctypes.addressof(packed),
            threads=torch.get_num_threads(),
        )

    def keep(self, value: Kept) -> Kept:
        """Holds on to what the structure points to."""
        self._kept.append(value)
        return value


def _rule(rule: UpdateRule) -> RuleStruct:
    decay = _NO_DECAY if not rule.weight_decay else _L2 if rule.decay == "l2" else _DECOUPLED
    return RuleStruct(
        RULES.index(rule.name),
        decay,
        rule.lr,
        rule.eps,
        rule.beta1,
        1.0 - rule.beta1,
        rule.beta2,
        1.0 - rule.beta2,
        rule.correction1,
        rule.correction2,
        rule.ftrl_beta,
        rule.l1,
        rule.l2,
        rule.weight_decay,
        1.0 - rule.lr * rule.weight_decay,
        rule.priority_gain,
        (c_float * TIERS)(*rule.promote_above),
    )


def _plain(tensor: Tensor, kind: torch.dtype, *shape: int) -> Tensor:
    """The tensor without gaps. The kernels would read whatever lies behind one of another type or shape."""
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (kind, shape, "cpu")
    return tensor.contiguous()


def _addresses(tensors: Sequence[Tensor]) -> "ctypes.Array[c_void_p]":
    return (c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _require_memory(fault: int) -> None:
    if fault == OUT_OF_MEMORY:
        raise MemoryError("no memory for the scratch space of an update")
