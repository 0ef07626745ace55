"""Causal attention of a slice to itself where it holds pieces of several sequences.

Long pieces are computed one by one where they lie. Short ones of similar length are padded on the right into one call;
causality keeps the padding away from what is real:

    tokens   a a a b b c c c c d          calls   [a a a .]   [b b]
                                                  [c c c c]   [d .]
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.pipeline.attention.kernels import Kernels, Triple
from thresher.pipeline.layout import Segment

LONG_TOKENS = 256
"""Pieces of this length or more are worth a call of their own: the kernels' blocks are not longer."""


@dataclass(frozen=True)
class Window:
    """One long piece: tokens begin .. end - 1 of the slice."""

    begin: int
    end: int

    def take(self, x: Tensor) -> Tensor:
        """[1 or B, heads, end - begin, ...], a view of x [B, heads, T, ...]."""
        return x[:, :, self.begin : self.end]

    def take_gradient(self, x: Tensor) -> Tensor:
        """As :meth:`take`."""
        return self.take(x)

    def put(self, target: Tensor, x: Tensor) -> None:
        """Writes what belongs to this piece."""
        self.take(target).copy_(x)


@dataclass(frozen=True)
class Padded:
    """Several short pieces as rows of one batch.

    Attributes:
        source: [n, L] int64 token of the slice at each place; padding repeats the piece's last token.
        real: [n, L] bool: no padding.
        places: [r] int64 places that are real, of n L.
        tokens: [r] int64 tokens at them.
    """

    source: Tensor
    real: Tensor
    places: Tensor
    tokens: Tensor

    def take(self, x: Tensor) -> Tensor:
        """[n, heads, L, ...], gathered from x [1, heads, T, ...]."""
        return x[0].index_select(1, self.source.flatten()).view(-1, *self.source.shape, *x.shape[3:]).transpose(0, 1)

    def take_gradient(self, x: Tensor) -> Tensor:
        """As :meth:`take`, with zeros in the padding, so that it adds nothing to any gradient."""
        real = self.real.view(len(self.real), 1, -1, *[1] * (x.dim() - 3))
        return self.take(x).where(real, 0)

    def put(self, target: Tensor, x: Tensor) -> None:
        """Writes what is real of x [n, heads, L, ...] to its tokens of target [1, heads, T, ...]."""
        target[0].index_copy_(1, self.tokens, x.transpose(0, 1).flatten(1, 2).index_select(1, self.places))


Group = Window | Padded


def group(segments: tuple[Segment, ...], device: torch.device) -> list[Group]:
    """The calls that ``segments`` of a slice need: each piece is in one of them."""
    groups: list[Group] = []
    short: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        length = segment.end - segment.begin
        if length >= LONG_TOKENS or len(segments) == 1:
            groups.append(Window(segment.begin, segment.end))
        else:
            short[length.bit_length()].append(segment)
    return groups + [_pad(pieces, device) for pieces in short.values()]


def _pad(pieces: list[Segment], device: torch.device) -> Group:
    if len(pieces) == 1:
        return Window(pieces[0].begin, pieces[0].end)
    begins, ends = torch.tensor([(piece.begin, piece.end) for piece in pieces]).T.unsqueeze(-1)
    source = begins + torch.arange(int((ends - begins).max()))
    real = source < ends
    source = source.minimum(ends - 1)
    indices = (source, real, real.flatten().nonzero().flatten(), source[real])
    return Padded(*(index.to(device) for index in indices))


def causal(
    kernels: Kernels, groups: list[Group], query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of every piece attending to itself; shapes as in :mod:`kernels`."""
    if _is_whole(groups):
        return kernels.flash(query, key, value, True, scale)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    for part in groups:
        own_out, own_lse = kernels.flash(part.take(query), part.take(key), part.take(value), True, scale)
        part.put(out, own_out)
        part.put(lse, own_lse)
    return out, lse


def causal_backward(
    kernels: Kernels,
    groups: list[Group],
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Triple:
    """Gradients of query, key and value of :func:`causal`; ``out`` and ``lse`` may be merged with other keys' parts."""
    if _is_whole(groups):
        return kernels.backward(dout, query, key, value, out, lse, True, scale)
    gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    for part in groups:
        q, k, v, merged, sums = (part.take(x) for x in (query, key, value, out, lse))
        found = kernels.backward(part.take_gradient(dout), q, k, v, merged, sums, True, scale)
        for gradient, own in zip(gradients, found, strict=True):
            part.put(gradient, own)
    return gradients


def _is_whole(groups: list[Group]) -> bool:
    return len(groups) == 1 and isinstance(groups[0], Window)
