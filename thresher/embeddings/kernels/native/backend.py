"""The CPU backend: rows looked up and updated by compiled code on several threads, to the bit as the reference does."""

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import Sorted, Table
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.checks import check_bags, check_form
from thresher.embeddings.kernels.native.library import BAD_BAGS, OUT_OF_MEMORY, Library
from thresher.embeddings.kernels.native.structs import BagsCall, Found, TableStructs, found_of, require_numbered
from thresher.embeddings.kernels.native.update import NativeUpdates


class Native(NativeUpdates):
    """See :class:`thresher.embeddings.kernels.backend.Backend`. Uses as many threads as torch does.

    Raises:
        MemoryError: in any call, if there is no memory for its work.
    """

    name = "native"

    def __init__(self, library: Library) -> None:
        self._library, self._functions = library, library.functions
        self._structs = TableStructs()

    def sort(self, tables: Sequence[Table], bags: Bags) -> Sorted:
        """See the contract."""
        check_form(bags)
        require_numbered(bags)
        call = self._call(tables, bags)
        array = self._structs.array(tables)
        found = Found(call, array, bags.weights is not None, bags.pooling is not Pooling.NONE)
        fault = self._functions.th_sort(array, byref(call.struct), byref(found.struct), torch.get_num_threads())
        self._require(fault, tables, bags)
        return Sorted(bags, found.unique(), found)

    def lookup(self, tables: Sequence[Table], bags: Bags, checked: Sorted | None = None) -> Tensor:
        """See the contract."""
        if checked is None:
            check_form(bags)
            call, array = self._call(tables, bags), self._structs.array(tables)
        else:
            call, array = found_of(checked).call, found_of(checked).tables
        output = torch.empty(call.shape)
        fault = self._functions.th_lookup(
            array, byref(call.struct), output.data_ptr(), checked is None, torch.get_num_threads()
        )
        self._require(fault, tables, bags)
        return output

    def weight_gradient(self, tables: Sequence[Table], bags: Bags, grad: Tensor) -> Tensor:
        """See the contract."""
        call, grad = self._call(tables, bags), grad.contiguous()
        assert grad.shape == call.shape
        assert grad.dtype == torch.float32
        result = torch.empty(call.struct.n)
        fault = self._functions.th_weight_gradient(
            self._structs.array(tables),
            byref(call.struct),
            grad.data_ptr(),
            result.data_ptr(),
            torch.get_num_threads(),
        )
        self._require(fault, tables, bags)
        return result

    def read(self, table: Table, rows: Tensor) -> Tensor:
        """See the contract; rows of -1 read zeros."""
        rows, output = rows.contiguous(), torch.empty(rows.numel(), table.dim)
        fault = self._functions.th_read(
            byref(self._structs.one(table)), rows.data_ptr(), rows.numel(), output.data_ptr(), torch.get_num_threads()
        )
        _require_memory(fault)
        return output

    def _call(self, tables: Sequence[Table], bags: Bags) -> BagsCall:
        return BagsCall(bags, [table.dim for table in tables])

    def _require(self, fault: int, tables: Sequence[Table], bags: Bags) -> None:
        if fault == BAD_BAGS:
            check_bags(tables, bags)
            raise AssertionError("the kernels refuse bags that the reference takes")
        _require_memory(fault)


def _require_memory(fault: int) -> None:
    if fault == OUT_OF_MEMORY:
        raise MemoryError("no memory for the scratch space of a lookup")
