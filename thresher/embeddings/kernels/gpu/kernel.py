"""How kernels are made and started."""

from collections.abc import Callable
from typing import Any

import triton

TILE = 1024
"""Numbers a program handles at once: rows of a tile times columns."""
WARPS = 4


def jit(function: Callable[..., Any]) -> Any:
    """A function compiled by Triton; arguments are tensors, or compile-time constants where annotated so.

    Tables are addressed by numbers (``layout.py``), so a launch serves any number of tables.
    """
    return triton.jit(function)


def launch(kernel: Any, programs: int, *arguments: Any) -> None:
    """Starts ``programs`` instances of a kernel; nothing for none.

    Multiplications and additions stay apart (no fused multiply-add), as the contract of backends wants.
    """
    if programs:
        kernel[(programs,)](*arguments, num_warps=WARPS, enable_fp_fusion=False)


def block_of(dim: int) -> int:
    """Columns of a tile for rows of up to ``dim`` numbers: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def rows_of(block: int) -> int:
    """Rows of a tile of ``block`` columns."""
    return max(1, TILE // block)
