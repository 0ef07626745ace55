"""Pointwise attention of a run of queries over a run of keys, rectangle by rectangle, and its backward."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.pipeline.attention.bias import Biases

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Rectangles:
    """Attention of consecutive queries over consecutive keys, all of one sequence of one microbatch.

    Attributes:
        biases: of the layer and microbatch.
        divisor: of sums over keys, S.
        edge: most tokens along a side of a rectangle.
    """

    biases: Biases
    divisor: int
    edge: int

    def forward(self, query: Tensor, queries: range, key: Tensor, value: Tensor, keys: range) -> Tensor:
        """[B, H, T, E] in the dtype of scores. ``queries`` and ``keys`` are numbers of tokens in the microbatch."""
        out = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, columns in self._walk(queries, keys):
            weights = F.silu(self._scores(_newest_first(query, queries, rows), rows, _cut(key, keys, columns), columns))
            _mask(weights, rows, columns)
            part = weights.to(value.dtype) @ _cut(value, keys, columns)
            _cut(out, queries, rows).add_(part.flip(2))
        return out.div_(self.divisor)

    def backward(self, dout: Tensor, query: Tensor, queries: range, key: Tensor, value: Tensor, keys: range) -> Triple:
        """Gradients of query, key and value in the dtype of scores; those of the tables go to ``biases``."""
        wide, scale = torch.promote_types(query.dtype, torch.float32), query.shape[3] ** -0.5
        dq, dk, dv = (
            torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        for rows, columns in self._walk(queries, keys):
            q, do = (_newest_first(x, queries, rows) for x in (query, dout))
            k, v = (_cut(x, keys, columns) for x in (key, value))
            scores = self._scores(q, rows, k, columns)
            weights = F.silu(scores)
            dscores = torch.ops.aten.silu_backward((do @ v.mT).to(wide).div_(self.divisor), scores)
            _mask(weights, rows, columns)
            _mask(dscores, rows, columns)
            self.biases.collect(dscores, rows, columns)
            low = dscores.mul_(scale).to(query.dtype)
            _cut(dv, keys, columns).add_(weights.to(query.dtype).mT @ do)
            _cut(dk, keys, columns).add_(low.mT @ q)
            _cut(dq, queries, rows).add_((low @ k).flip(2))
        return dq, dk, dv.div_(self.divisor)

    def _walk(self, queries: range, keys: range) -> Iterator[tuple[range, range]]:
        """Rectangles that hold at least one visible pair."""
        for rows in _chop(queries, self.edge):
            for columns in _chop(range(keys.start, min(keys.stop, rows.stop)), self.edge):
                yield rows, columns

    def _scores(self, query: Tensor, rows: range, key: Tensor, columns: range) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query @ key.mT).to(wide).mul_(query.shape[3] ** -0.5)
        self.biases.add(scores, rows, columns)
        return scores


def _chop(tokens: range, edge: int) -> Iterator[range]:
    return (range(first, min(first + edge, tokens.stop)) for first in range(tokens.start, tokens.stop, edge))


def _cut(values: Tensor, tokens: range, part: range) -> Tensor:
    """Rows ``part`` of ``values`` [B, H, T, E], which are those of ``tokens``; a view."""
    return values[:, :, part.start - tokens.start : part.stop - tokens.start]


def _newest_first(values: Tensor, tokens: range, part: range) -> Tensor:
    """As :func:`_cut`, last row first: how :mod:`bias` wants queries."""
    return _cut(values, tokens, part).flip(2)


def _mask(values: Tensor, rows: range, columns: range) -> None:
    """Zeros in ``values`` [B, H, Tq, Tk], newest query first, where the key comes after the query."""
    if columns[-1] > rows[0]:
        ages = torch.arange(rows[-1], rows[0] - 1, -1, device=values.device).unsqueeze(1)
        values.masked_fill_(torch.arange(columns.start, columns.stop, device=values.device) > ages, 0.0)
