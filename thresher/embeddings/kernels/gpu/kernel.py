"""How kernels are made and started."""

from collections.abc import Callable
from typing import Any

import triton

TILE = 1024
"""Numbers that a program handles at once."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "enable_reflect_ftz": False}
"""Of all kernels: every operation is rounded once (no fused multiply-add), small numbers are not flushed to zero."""


def jit(function: Callable[..., Any]) -> Any:
    """A function compiled by Triton; arguments are tensors, or compile-time constants where annotated so.

    Tables are addressed by numbers (``layout.py``), so a launch serves any number of tables.
    """
    return triton.jit(function)


def launch(kernel: Any, programs: int, *arguments: Any) -> None:
    """Starts ``programs`` instances of a kernel; nothing for none."""
    if programs:
        kernel[(programs,)](*arguments, **OPTIONS)


def block_of(dim: int) -> int:
    """Columns of a tile for rows of up to ``dim`` numbers: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())
