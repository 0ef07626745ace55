"""Causal softmax attention of one slice: over itself, and over the earlier tokens of its sequence in the pool.

One causal call, one unmasked call over the contiguous prefix, one merge. Backward gives every part the merged out and
logsumexp; gradients of earlier keys and values wait in the store for the backward of their own slices, so those run
strictly newest first.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.pipeline.attention import segments
from thresher.pipeline.attention.groups import require_groups
from thresher.pipeline.attention.keep import keep, with_rows
from thresher.pipeline.attention.kernels import Triple, choose, merge
from thresher.pipeline.attention.port import Arriving
from thresher.pipeline.attention.regions import history
from thresher.pipeline.attention.sharing import Deal, find_deal
from thresher.pipeline.attention.store import Pair, Part

if TYPE_CHECKING:
    from thresher.pipeline.attention.sliced import SlicedContext


def sliced_softmax(context: "SlicedContext", layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B, H, T, E] of the slice of ``context``.

    For backward it keeps the query, the output and its logsumexp; keys and values are kept in the store, once for all
    slices. They are kept by themselves where there is one slice only.

    Args:
        context: the slice.
        layer: index of the layer in the trunk.
        query: [B, H, T, E].
        key, value: [B, G, T, E].

    Raises:
        ConfigError: G does not divide H, or there are not as many values as keys.
    """
    require_groups(query, key, value)
    out: Tensor = _Attention.apply(query, key, value, context, layer)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, context: "SlicedContext", layer: int) -> Tensor:
        work = _Work(context, layer, query, key.shape[1])
        query, key, value = keep(context, layer, query, key, value)
        out, lse = work.forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.context, ctx.layer = context, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        work = _Work(ctx.context, ctx.layer, query, key.shape[1])
        return *work.backward(with_rows(dout), query, key, value, out, lse), None, None


class _Work:
    """What one call needs to know: which tokens are computed here, and which by the peer of an exchange."""

    def __init__(self, context: "SlicedContext", layer: int, query: Tensor, groups: int) -> None:
        self.store, self.number, self.index, self.layer = context.store, context.number, context.index, layer
        self.layout = context.layout
        self.pieces = context.pieces(query.device)
        self.looking = self.layout.segments(self.index)[0].end
        self.kernels, self.scale = choose(query), query.shape[-1] ** -0.5
        deal = find_deal(context.port, self.layout, self.index)
        self.shared = _Shared(deal, self, query, groups) if deal else None
        past = history(self.layout, self.index)
        self.here = range(deal.tokens.stop, past.stop) if deal and deal.gives else past

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of the whole slice."""
        looking = query[:, :, : self.looking]
        arriving = self.shared.start_forward(looking) if self.shared else None
        out, lse = segments.causal(self.kernels, self.pieces, query, key, value, self.scale)
        merged = (out[:, :, : self.looking], lse[:, :, : self.looking])
        for part in self._parts():
            merge(*merged, *self.kernels.flash(looking, part.key, part.value, False, self.scale))
        if self.shared and arriving:
            self.shared.finish_forward(arriving, *merged)
        return out, lse

    def backward(self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> Triple:
        """Gradients of query, key and value; those of earlier keys and values go to the store."""
        do, q, o, sums = (x[:, :, : self.looking] for x in (dout, query, out, lse))
        arriving = self.shared.start_backward(do, q, o, sums) if self.shared else None
        dq, dk, dv = segments.causal_backward(self.kernels, self.pieces, dout, query, key, value, out, lse, self.scale)
        for part in self._parts():
            found = self.kernels.backward(do, q, part.key, part.value, o, sums, False, self.scale)
            dq[:, :, : self.looking].add_(found[0])
            self.store.add(self.layer, self.number, part, found[1:])
        if self.shared and arriving:
            self.shared.finish_backward(arriving, dq[:, :, : self.looking])
        later = self.store.take(self.layer, self.number, self.index) if self.layout.slices > 1 else None
        return (dq, dk, dv) if later is None else (dq, dk.add_(later[0]), dv.add_(later[1]))

    def _parts(self) -> list[Part]:
        return self.store.parts(self.layer, self.number, self.here) if self.here else []


class _Shared:
    """The exchange of one call, from the side of the giver or of the helper (see :mod:`port`)."""

    def __init__(self, deal: Deal, work: _Work, query: Tensor, groups: int) -> None:
        self.deal = deal
        self.store, self.layer, self.number = work.store, work.layer, work.number
        self.kernels, self.scale = work.kernels, work.scale
        _, heads, _, width = query.shape
        keys, queries = (deal.batch, groups, len(deal.tokens), width), (deal.batch, heads, deal.queries, width)
        self.key, self.query = (keys, query.dtype), (queries, query.dtype)
        self.lse = (queries[:3], torch.promote_types(query.dtype, torch.float32))

    def start_forward(self, query: Tensor) -> Arriving:
        """Sends what the helper needs, or starts to receive it."""
        if not self.deal.gives:
            return self.deal.port.receive([self.key, self.key, self.query])
        self._send(*self._moved(), query)
        return self.deal.port.receive([self.query, self.lse])

    def finish_forward(self, arriving: Arriving, out: Tensor, lse: Tensor) -> None:
        """Merges what the helper found; or attends for the giver and sends it."""
        if self.deal.gives:
            other, other_lse = arriving.wait()
            merge(out, lse, other, other_lse)
        else:
            key, value, query = arriving.wait()
            self._send(*self.kernels.flash(query, key, value, False, self.scale))

    def start_backward(self, dout: Tensor, query: Tensor, out: Tensor, lse: Tensor) -> Arriving:
        """As :meth:`start_forward`."""
        if not self.deal.gives:
            kinds = [self.key, self.key, self.query, self.query, self.lse, self.query]
            return self.deal.port.receive(kinds)
        self._send(*self._moved(), query, out, lse, dout)
        return self.deal.port.receive([self.query, self.key, self.key])

    def finish_backward(self, arriving: Arriving, dq: Tensor) -> None:
        """Adds what the helper found to ``dq`` and to the store; or computes it for the giver and sends it."""
        if self.deal.gives:
            found, dk, dv = arriving.wait()
            dq.add_(found)
            self.store.add_tokens(self.layer, self.number, self.deal.tokens, (dk, dv))
        else:
            key, value, query, out, lse, dout = arriving.wait()
            self._send(*self.kernels.backward(dout, query, key, value, out, lse, False, self.scale))

    def _moved(self) -> Pair:
        return self.store.gather(self.layer, self.number, self.deal.tokens)

    def _send(self, *tensors: Tensor) -> None:
        self.deal.port.send([x.contiguous() for x in tensors])
