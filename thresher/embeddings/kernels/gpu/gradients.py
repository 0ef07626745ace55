"""Gradients of rows: the sums of what their occurrences get, and sums of squares of them."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from thresher.embeddings.kernels.gpu.kernel import TILE, jit, launch
from thresher.embeddings.kernels.gpu.lookup import read_rows
from thresher.embeddings.kernels.gpu.records import inside_of
from thresher.embeddings.kernels.gpu.rules import column_sums, l2_gradient
from thresher.embeddings.kernels.gpu.sort import Runs


@dataclass(frozen=True)
class Gradients:
    """What the gradient of an output means for the distinct rows.

    Attributes:
        runs: of the rows.
        grad: of the output.
        pieces: [P, D] sums of the pieces of cut runs, None if no run is cut.
    """

    runs: Runs
    grad: Tensor
    pieces: Tensor | None

    @property
    def arguments(self) -> tuple[object, ...]:
        """Of :func:`row_gradients`, as far as they are the same for all programs."""
        runs = self.runs
        whole = (runs.starts, self.grad, runs.source, runs.factor)
        if runs.long is None:
            return (*whole, None, None, 1)
        return (*whole, runs.long.first_piece, self.pieces, runs.long.piece)


def gradients_of(runs: Runs, grad: Tensor) -> Gradients:
    """Sums up the pieces of runs that are cut; the rest is summed where it is used."""
    grad = grad.contiguous()
    if runs.long is None:
        return Gradients(runs, grad, None)
    layout, cut = runs.layout, runs.long
    count, rows = cut.table.numel(), layout.rows
    pieces = torch.empty(count, layout.block, device=grad.device)
    launch(
        _add_pieces,
        -(-count // rows),
        *(layout.numbers, cut.table, cut.starts, cut.ends, grad, runs.source, runs.factor, pieces, count),
        *(layout.align, rows, layout.block),
    )
    return Gradients(runs, grad, pieces)


def sums_of_squares(gradients: Gradients, rules: Tensor) -> Tensor:
    """[U] fp32: of the columns of each row's gradient, L2 decay included."""
    runs, layout = gradients.runs, gradients.runs.layout
    count, rows = runs.row.numel(), layout.rows
    sums = torch.empty(count, device=gradients.grad.device)
    launch(
        _square,
        -(-count // rows),
        *(layout.numbers, rules, runs.table, runs.row, *gradients.arguments, sums, count),
        *(layout.levels, layout.align, rows, layout.block),
    )
    return sums


def run_sums(runs: Runs, values: Tensor) -> Tensor:
    """[U] sums of fp32 ``values`` [m], one for each occurrence, over the runs."""
    sums = torch.empty(runs.row.numel(), device=values.device)
    starts, ends, cut = runs.starts[:-1], runs.starts[1:], runs.long
    if cut is None:
        _add(values, starts, ends, sums)
        return sums
    pieces = torch.empty(cut.table.numel(), device=values.device)
    _add(values, cut.starts, cut.ends, pieces)
    whole = cut.first_piece < 0
    _add(values, starts, torch.where(whole, ends, starts), sums)
    number = -((starts - ends) // cut.piece)
    joined = torch.empty_like(sums)
    _add(pieces, cut.first_piece, torch.where(whole, cut.first_piece, cut.first_piece + number), joined)
    return torch.where(whole, sums, joined)


def _add(values: Tensor, starts: Tensor, ends: Tensor, sums: Tensor) -> None:
    launch(_add_up, -(-sums.numel() // TILE), values, starts, ends, sums, sums.numel(), TILE)


@jit
def row_gradients(
    at: tl.tensor,
    live: tl.tensor,
    inside: tl.tensor,
    starts: tl.tensor,
    grad: tl.tensor,
    source: tl.tensor,
    factor: tl.tensor,
    first_piece: tl.tensor,
    pieces: tl.tensor,
    piece: tl.tensor,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """[R, D] gradients of the rows number ``at`` [R]."""
    start = tl.load(starts + at, mask=live, other=0)
    length = (tl.load(starts + at + 1, mask=live, other=0) - start).to(tl.int32)
    if pieces is None:
        total = summed(start, length, inside, grad, source, factor, align, rows, block)
    else:
        first = tl.load(first_piece + at, mask=live, other=-1)
        whole = first < 0
        total = summed(start, tl.where(whole, length, 0), inside, grad, source, factor, align, rows, block)
        number = tl.where(whole, 0, (length + piece - 1) // piece)
        columns = tl.arange(0, block)[None, :]
        for step in range(tl.max(number, axis=0)):
            going = inside & (step < number)[:, None]
            total += tl.load(pieces + (first + step)[:, None] * block + columns, mask=going, other=0.0)
    return total


@jit
def summed(
    start: tl.tensor,
    length: tl.tensor,
    inside: tl.tensor,
    grad: tl.tensor,
    source: tl.tensor,
    factor: tl.tensor,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """[R, D]: what occurrences ``start`` .. ``start + length - 1`` [R] get, one after the other."""
    columns = tl.arange(0, block)[None, :]
    total = tl.zeros([rows, block], tl.float32)
    for step in range(tl.max(length, axis=0)):
        going = step < length
        at = tl.multiple_of(tl.load(source + start + step, mask=going, other=0), align)
        g = tl.load(grad + at[:, None] + columns, mask=inside & going[:, None], other=0.0)
        if factor is not None:
            g = g * tl.load(factor + start + step, mask=going, other=0.0)[:, None]
        total += g
    return total


@jit
def _add_pieces(
    numbers: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    grad: tl.tensor,
    source: tl.tensor,
    factor: tl.tensor,
    pieces: tl.tensor,
    count: tl.tensor,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A tile of pieces."""
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = at < count
    table = tl.load(tables + at, mask=live, other=0)
    start = tl.load(starts + at, mask=live, other=0)
    length = (tl.load(ends + at, mask=live, other=0) - start).to(tl.int32)
    inside = inside_of(numbers, table, live, align, block)
    total = summed(start, length, inside, grad, source, factor, align, rows, block)
    tl.store(pieces + at.to(tl.int64)[:, None] * block + tl.arange(0, block)[None, :], total, mask=live[:, None])


@jit
def _square(
    numbers: tl.tensor,
    rules: tl.tensor,
    tables: tl.tensor,
    row_numbers: tl.tensor,
    starts: tl.tensor,
    grad: tl.tensor,
    source: tl.tensor,
    factor: tl.tensor,
    first_piece: tl.tensor,
    pieces: tl.tensor,
    piece: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    levels: tl.constexpr,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A tile of rows."""
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = at < count
    table = tl.load(tables + at, mask=live, other=0)
    row = tl.load(row_numbers + at, mask=live, other=0)
    inside = inside_of(numbers, table, live, align, block)
    g = row_gradients(at, live, inside, starts, grad, source, factor, first_piece, pieces, piece, align, rows, block)
    g = l2_gradient(rules, table, read_rows(numbers, table, row, live, levels, align, block), g)
    tl.store(sums + at, column_sums(g * g, rows, block), mask=live)


@jit
def _add_up(
    values: tl.tensor, starts: tl.tensor, ends: tl.tensor, sums: tl.tensor, count: tl.tensor, rows: tl.constexpr
) -> None:
    at = tl.program_id(0) * rows + tl.arange(0, rows)
    live = at < count
    start = tl.load(starts + at, mask=live, other=0)
    length = (tl.load(ends + at, mask=live, other=0) - start).to(tl.int32)
    total = tl.zeros([rows], tl.float32)
    for step in range(tl.max(length, axis=0)):
        total += tl.load(values + start + step, mask=step < length, other=0.0)
    tl.store(sums + at, total, mask=live)
