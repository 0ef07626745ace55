"""Biases of pointwise attention by distance and by time, for any rectangle of scores; gradients of their tables.

Rectangles have their queries *newest first*: entry [i, j] belongs to query ``queries[-1 - i]`` and key ``keys[j]``,
both numbers of tokens in the microbatch. Distances then depend on i + j alone, so a rectangle of biases is a view of
one row of Tq + Tk - 1 numbers, and the gradient of that row is a sum along antidiagonals.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.errors import BadBatch
from thresher.pipeline.context import RelativeBias


class Biases:
    """The tables of one layer, and what rectangles add to their gradients.

    Args:
        bias: the tables; None adds nothing.
        times: [B, S] int64 of the microbatch, needed where there is a table by time.
        like: gives the dtype of scores and the device.

    Attributes:
        of_position: [H, P] gradient, in the dtype of scores; None where there is no table.
        of_time: [H, Q] gradient, likewise.

    Raises:
        BadBatch: the microbatch has no times.
    """

    def __init__(self, bias: RelativeBias | None, times: Tensor | None, like: Tensor) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        self._position = None if bias is None else bias.by_position.detach().to(wide)
        self._time = None if bias is None or bias.by_time is None else bias.by_time.detach().to(wide)
        self._times = None if self._time is None else require_times(times).to(like.device)
        self.of_position = None if self._position is None else torch.zeros_like(self._position)
        self.of_time = None if self._time is None else torch.zeros_like(self._time)

    @property
    def gradients(self) -> list[Tensor]:
        """Those there are, by position first."""
        return [gradient for gradient in (self.of_position, self.of_time) if gradient is not None]

    def add(self, scores: Tensor, queries: range, keys: range) -> None:
        """Adds the biases of a rectangle to ``scores`` [B, H, Tq, Tk]."""
        if self._position is not None:
            newest = queries[-1] - keys[0]
            distances = torch.arange(newest, newest - len(queries) - len(keys) + 1, -1, device=scores.device)
            row = self._position[:, distances.clamp_(0, self._position.shape[1] - 1)]
            scores += row.unfold(1, len(keys), 1)
        if self._time is not None:
            buckets = self._buckets(queries, keys)
            scores += self._time.index_select(1, buckets.flatten()).view(-1, *buckets.shape).transpose(0, 1)

    def collect(self, gradient: Tensor, queries: range, keys: range) -> None:
        """Adds to the gradients of the tables what a rectangle of ``gradient`` [B, H, Tq, Tk] means for them."""
        if self.of_position is not None:
            _add_by_distance(self.of_position, gradient.sum(0), queries[-1] - keys[0])
        if self.of_time is not None:
            _add_by_bucket(self.of_time, gradient.transpose(0, 1), self._buckets(queries, keys))

    def _buckets(self, queries: range, keys: range) -> Tensor:
        """[B, Tq, Tk] int64."""
        assert self._times is not None
        assert self._time is not None
        of_queries = self._times[:, queries.start : queries.stop].flip(1).unsqueeze(2)
        of_keys = self._times[:, keys.start : keys.stop].unsqueeze(1)
        return time_buckets(of_queries - of_keys, self._time.shape[1])


def time_buckets(differences: Tensor, buckets: int) -> Tensor:
    """min(floor(log2(1 + |d|)), buckets - 1) of int64 ``differences``, int64; exact up to 2^53."""
    exponents = torch.frexp((differences.abs() + 1).double()).exponent - 1
    return exponents.clamp_(max=buckets - 1).long()


def require_times(times: Tensor | None) -> Tensor:
    """``times`` of a microbatch, for a table by time.

    Raises:
        BadBatch: there are none.
    """
    if times is None:
        raise BadBatch(
            "attention is biased by time, but the microbatch has no times",
            where="Microbatch.times",
            fix="hand in [B, S] int64 seconds, or leave out the table by time",
        )
    return times


def _add_by_distance(total: Tensor, gradient: Tensor, newest: int) -> None:
    """Adds to ``total`` [H, P] the sums of ``gradient`` [H, Tq, Tk] over equal distances: ``newest`` - i - j."""
    heads, rows, columns = gradient.shape
    # A row longer by one than the shift between rows moves row i by i columns.
    skewed = F.pad(gradient, (0, rows)).flatten(1)[:, : rows * (rows + columns - 1)].view(heads, rows, -1)
    ascending = skewed.sum(1).flip(1)
    oldest, last = newest - rows - columns + 2, total.shape[1] - 1
    first = max(oldest, 0)
    border = max(last, first) - oldest
    alone = ascending[:, first - oldest : border]
    total[:, first : first + alone.shape[1]] += alone
    total[:, last] += ascending[:, border:].sum(1)


def _add_by_bucket(total: Tensor, gradient: Tensor, buckets: Tensor) -> None:
    """Adds to ``total`` [H, Q] the sums of ``gradient`` [H, B, Tq, Tk] over equal ``buckets`` [B, Tq, Tk].

    The order of additions is fixed: on CPU ``scatter_add_`` is serial in each row, elsewhere ``index_put_`` sorts.
    """
    heads = total.shape[0]
    places = buckets.flatten().expand(heads, -1)
    sums = torch.zeros_like(total)
    if total.device.type == "cpu":
        sums.scatter_add_(1, places, gradient.flatten(1))
    else:
        rows = torch.arange(heads, device=total.device).unsqueeze(1)
        sums.index_put_((rows, places), gradient.flatten(1), accumulate=True)
    total += sums
