"""Rows to outputs: bags pooled, rows read, and the gradient of the ids' weights."""

import torch
import triton.language as tl
from torch import Tensor

from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.gpu.kernel import jit, launch
from thresher.embeddings.kernels.gpu.layout import Layout
from thresher.embeddings.kernels.gpu.places import Places
from thresher.embeddings.kernels.gpu.records import inside_of, places_of, read_weights
from thresher.embeddings.kernels.gpu.rules import column_sums


def pooled(layout: Layout, bags: Bags, places: Places) -> Tensor:
    """The output of a lookup."""
    output = torch.zeros(places.shape, device=bags.ids.device)
    rows, count = layout.rows, places.table.numel()
    launch(
        _pool,
        -(-count // rows),
        *(layout.numbers, bags.ids, places.starts, bags.weights, places.table, places.output, output, count),
        *(bags.pooling is Pooling.MEAN, bags.pooling is not Pooling.NONE),
        *(layout.levels, layout.align, rows, layout.block),
    )
    return output


def weight_gradient(layout: Layout, bags: Bags, places: Places, grad: Tensor) -> Tensor:
    """[n] fp32: each row times the gradient of its bag's vector (its sum where the bag is pooled by MEAN)."""
    count, rows = bags.ids.numel(), layout.rows
    result = torch.zeros(count, device=grad.device)
    launch(
        _weigh,
        -(-count // rows),
        *(layout.numbers, bags.ids, places.starts, places.bag, places.table, places.output, grad, result, count),
        *(bags.pooling is Pooling.MEAN, layout.levels, layout.align, rows, layout.block),
    )
    return result


@jit
def read_rows(
    numbers: tl.tensor,
    table: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    levels: tl.constexpr,
    align: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """[R, D] fp32 values of live rows, zeros of others."""
    tier, slot, scale = places_of(numbers, table, row, live)
    inside = inside_of(numbers, table, live, align, block)
    return read_weights(numbers, table, row, tier, slot, scale, inside, levels, align, block)


@jit
def inverse_length(length: tl.tensor) -> tl.tensor:
    """[R] fp32 1 / length, 1 for empty bags."""
    size = tl.maximum(length, 1).to(tl.float32)
    return tl.math.div_rn(tl.zeros_like(size) + 1.0, size)


@jit
def _pool(
    numbers: tl.tensor,
    ids: tl.tensor,
    starts: tl.tensor,
    weights: tl.tensor,
    tables: tl.tensor,
    outputs: tl.tensor,
    output: tl.tensor,
    count: tl.tensor,
    mean: tl.constexpr,
    summed: tl.constexpr,
    levels: tl.constexpr,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A tile of bags, id after id."""
    bag = tl.program_id(0) * rows + tl.arange(0, rows)
    live = bag < count
    table = tl.load(tables + bag, mask=live, other=0)
    start = tl.load(starts + bag, mask=live, other=0)
    length = (tl.load(starts + bag + 1, mask=live, other=0) - start).to(tl.int32)
    total = tl.zeros([rows, block], tl.float32)
    for step in range(tl.max(length, axis=0)):
        going = step < length
        row = tl.load(ids + start + step, mask=going, other=-1).to(tl.int64)
        x = read_rows(numbers, table, row, going & (row >= 0), levels, align, block)
        if weights is not None:
            x = tl.load(weights + start + step, mask=going, other=0.0)[:, None] * x
        if summed:
            total += x
        else:
            total = x
    if mean:
        total = total * inverse_length(length)[:, None]
    columns = tl.arange(0, block)[None, :]
    at = tl.multiple_of(tl.load(outputs + bag, mask=live, other=0), align)
    tl.store(output + at[:, None] + columns, total, mask=inside_of(numbers, table, live, align, block))


@jit
def _weigh(
    numbers: tl.tensor,
    ids: tl.tensor,
    starts: tl.tensor,
    bags: tl.tensor,
    tables: tl.tensor,
    outputs: tl.tensor,
    grad: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    mean: tl.constexpr,
    levels: tl.constexpr,
    align: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A tile of ids."""
    number = tl.program_id(0) * rows + tl.arange(0, rows)
    live = number < count
    bag = tl.load(bags + number, mask=live, other=0)
    table = tl.load(tables + bag, mask=live, other=0)
    row = tl.load(ids + number, mask=live, other=-1).to(tl.int64)
    x = read_rows(numbers, table, row, live & (row >= 0), levels, align, block)
    at = tl.multiple_of(tl.load(outputs + bag, mask=live, other=0), align)
    columns = tl.arange(0, block)[None, :]
    g = tl.load(grad + at[:, None] + columns, mask=inside_of(numbers, table, live, align, block), other=0.0)
    dots = column_sums(g * x, rows, block)
    if mean:
        start = tl.load(starts + bag, mask=live, other=0)
        dots = dots * inverse_length((tl.load(starts + bag + 1, mask=live, other=0) - start).to(tl.int32))
    tl.store(result + number, dots, mask=live)
