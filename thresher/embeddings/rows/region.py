"""Memory of tables: reserved at once, committed by the system page by page as rows are written.

Reserving costs nothing, so a slab has one address for as many rows as it may ever hold and never moves. Anonymous
memory asks for 2 MB pages: random rows then cost half as much (no miss in the page table for each). A file-backed
region lives in a sparse file and can be larger than memory; what is mapped of it is dropped on demand.
"""

import ctypes
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from thresher.errors import PlanError

HUGE_PAGE_BYTES = 1 << 21
PAGE_BYTES = mmap.PAGESIZE
_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which the mmap module of Python 3.11 does not name

_IN_MEMORY = "cut the table over more ranks, or set vm.overcommit_memory to 0 or 1"
_IN_FILE = "choose a folder that can be written, on a file system that holds files of this size"


class Region:
    """A fixed range of zeroed bytes.

    Args:
        size_bytes: rounded up to whole 2 MB pages; at least one.
        path: a file to hold the bytes, created or emptied; None for memory.

    Attributes:
        bytes: [size] uint8 tensor over the whole range.

    Raises:
        PlanError: the address space or the file system refuses.
    """

    def __init__(self, size_bytes: int, path: Path | None = None) -> None:
        self.size_bytes = max(-(-size_bytes // HUGE_PAGE_BYTES), 1) * HUGE_PAGE_BYTES
        self.path = path
        try:
            self._map = self._mapped(path, size_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
        except (OSError, ValueError, OverflowError) as error:
            raise PlanError(
                f"{self.size_bytes / 1e9:.3g} GB for a table cannot be reserved ({error})",
                where=str(path or "memory"),
                fix=_IN_MEMORY if path is None else _IN_FILE,
            ) from error
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def _mapped(self, path: Path | None, in_huge_pages: int) -> mmap.mmap:
        if path is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            mapped = mmap.mmap(-1, self.size_bytes, flags=flags)
            if in_huge_pages:  # the rest, of which a huge page would commit more than is asked for, has small ones
                mapped.madvise(mmap.MADV_HUGEPAGE, 0, in_huge_pages)
            return mapped
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(handle, self.size_bytes)
            mapped = mmap.mmap(handle, self.size_bytes, flags=mmap.MAP_SHARED)
        finally:
            os.close(handle)
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped

    def forget(self, first_byte: int) -> None:
        """Gives back the memory of all bytes from ``first_byte`` on, rounded up to a page; they read as zeros."""
        start = -(-first_byte // PAGE_BYTES) * PAGE_BYTES
        if start < self.size_bytes:
            advice = mmap.MADV_DONTNEED if self.path is None else mmap.MADV_REMOVE
            self._map.madvise(advice, start, self.size_bytes - start)

    def unload(self) -> None:
        """Drops the mapped pages of a file-backed region; its bytes stay, in the file. Nothing for memory."""
        if self.path is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def forget(values: Tensor) -> None:
    """Sets a contiguous tensor to zeros and, in CPU memory, gives the pages that lie wholly in it back to the system.

    It may be part of a region that holds other tensors, too; no region in a file.
    """
    start = values.data_ptr()
    first, last = -(-start // PAGE_BYTES) * PAGE_BYTES, (start + values.nbytes) // PAGE_BYTES * PAGE_BYTES
    if values.device.type != "cpu" or first >= last:
        values.zero_()
        return
    # Through its address: who made the region is not known here.
    if ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED):
        values.zero_()
        return
    edges = values.view(-1).view(torch.uint8)
    edges[: first - start].zero_()
    edges[last - start :].zero_()
