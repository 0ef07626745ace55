"""Pointwise attention (HSTU, arXiv:2402.17152, equation 2) of one slice over itself and the slices before it.

    out_i = sum over j <= i of silu(q_i . k_j / sqrt(E) + bias_ij) v_j / S,   S = layout.divisor

There is no normaliser, so partial results over sets of keys simply add up. Scores are computed rectangle by rectangle,
in forward and again in backward; a T x S matrix of them never exists. Only pairs of tokens of one sequence with the key
not after the query are visited.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from thresher.errors import ConfigError
from thresher.pipeline.attention.bias import Biases, require_times, time_buckets
from thresher.pipeline.attention.keep import keep
from thresher.pipeline.attention.port import Arriving
from thresher.pipeline.attention.rectangles import Rectangles, Triple
from thresher.pipeline.attention.regions import history
from thresher.pipeline.attention.sharing import Deal, find_deal
from thresher.pipeline.attention.store import Pair, Part
from thresher.pipeline.context import RelativeBias
from thresher.pipeline.layout import Layout

if TYPE_CHECKING:
    from thresher.pipeline.attention.sliced import SlicedContext
    from thresher.pipeline.attention.whole import WholeContext

CPU_EDGE, DEVICE_EDGE = 256, 1024
"""Tokens along each side of a rectangle: on a CPU it should stay in cache, elsewhere it should fill the device."""


def sliced_pointwise(
    context: "SlicedContext", layer: int, query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None
) -> Tensor:
    """Attention [B, H, T, E] of the slice of ``context``, from query, key and value [B, H, T, E] of this slice alone.

    For backward it keeps the query; keys and values are kept in the store, once for all slices, or by themselves where
    there is one slice only. Gradients of earlier keys and values wait in the store: backward runs newest slice first.

    Raises:
        ConfigError: heads of queries, keys, values and tables differ.
        BadBatch: there is a bias by time, but the microbatch has no times.
    """
    require_heads(query, key, value, bias)
    tables = (None, None) if bias is None else (bias.by_position, bias.by_time)
    out: Tensor = _Pointwise.apply(query, key, value, *tables, context, layer)  # type: ignore[no-untyped-call]
    return out


def whole_pointwise(
    context: "WholeContext", layer: int, query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None
) -> Tensor:
    """The reference: [B, H, S, E] of the whole microbatch under autograd, all scores at once.

    Raises:
        ConfigError, BadBatch: as :func:`sliced_pointwise`.
    """
    require_heads(query, key, value, bias)
    wide = torch.promote_types(query.dtype, torch.float32)
    tokens = torch.arange(query.shape[2], device=query.device)
    starts = torch.tensor(context.layout.starts, device=query.device)
    sequence = torch.bucketize(tokens, starts, right=True)
    distance = tokens.unsqueeze(1) - tokens
    visible = (distance >= 0) & (sequence.unsqueeze(1) == sequence)
    scores = (query @ key.mT).to(wide) * query.shape[3] ** -0.5
    if bias is not None:
        scores = scores + bias.by_position.to(wide)[:, distance.clamp(0, bias.by_position.shape[1] - 1)]
    if bias is not None and bias.by_time is not None:
        times = require_times(context.microbatch.times).to(query.device)
        buckets = time_buckets(times.unsqueeze(2) - times.unsqueeze(1), bias.by_time.shape[1])
        scores = scores + bias.by_time.to(wide)[:, buckets].transpose(0, 1)
    weights = F.silu(scores) * visible
    return (weights.to(value.dtype) @ value) / context.layout.divisor


def require_heads(query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None) -> None:
    """Refuses grouped queries and tables of another number of heads.

    Raises:
        ConfigError: says what has how many.
    """
    heads = {"queries": query.shape[1], "keys": key.shape[1], "values": value.shape[1]}
    if bias is not None:
        heads["biases by position"] = bias.by_position.shape[0]
    if bias is not None and bias.by_time is not None:
        heads["biases by time"] = bias.by_time.shape[0]
    if len(set(heads.values())) > 1:
        raise ConfigError(
            f"pointwise attention was given {', '.join(f'{count} heads of {name}' for name, count in heads.items())}",
            where="attention",
            fix="give all of them the same number of heads",
        )


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        by_position: Tensor | None,
        by_time: Tensor | None,
        context: "SlicedContext",
        layer: int,
    ) -> Tensor:
        ctx.context, ctx.layer = context, layer
        with torch.autocast(query.device.type, enabled=False):
            work = _Work(context, layer, query, _bias(by_position, by_time))
            query, key, value = keep(context, layer, query, key, value)
            ctx.save_for_backward(query, key, value, by_position, by_time)
            return work.forward(query, key, value).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, by_position, by_time = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            work = _Work(ctx.context, ctx.layer, query, _bias(by_position, by_time))
            gradients = work.backward(dout, query, key, value)
            of_tables = [
                None if table is None or gradient is None else gradient.to(table.dtype)
                for table, gradient in ((by_position, work.biases.of_position), (by_time, work.biases.of_time))
            ]
            return *(gradient.to(query.dtype) for gradient in gradients), *of_tables, None, None


def _bias(by_position: Tensor | None, by_time: Tensor | None) -> RelativeBias | None:
    return None if by_position is None else RelativeBias(by_position, by_time)


class _Work:
    """What one call needs to know: which tokens are computed here, and which by the peer of an exchange."""

    def __init__(self, context: "SlicedContext", layer: int, query: Tensor, bias: RelativeBias | None) -> None:
        self.store, self.number, self.index, self.layer = context.store, context.number, context.index, layer
        self.layout = context.layout
        self.low = self.layout.bounds[self.index]
        self.segments = self.layout.segments(self.index)
        self.biases = Biases(bias, context.microbatch.times, query)
        self.rectangles = _rectangles(self.biases, self.layout, query)
        deal = find_deal(context.port, self.layout, self.index)
        self.shared = _Shared(deal, self, query, bias) if deal else None
        past = history(self.layout, self.index)
        self.here = range(deal.tokens.stop, past.stop) if deal and deal.gives else past

    @property
    def looking(self) -> range:
        """Tokens of the first segment, the only one that may look back."""
        return range(self.low, self.low + self.segments[0].end)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, E] in the dtype of scores."""
        looking = query[:, :, : len(self.looking)]
        arriving = self.shared.start_forward(looking) if self.shared else None
        pieces = [
            self.rectangles.forward(q, tokens, k, v, tokens) for tokens, (q, k, v) in self._own(query, key, value)
        ]
        for part in self._parts():
            for tokens, k, v in _runs(part):
                pieces[0] += self.rectangles.forward(looking, self.looking, k, v, tokens)
        if self.shared and arriving:
            self.shared.finish_forward(arriving, pieces[0])
        return _joined(pieces)

    def backward(self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Triple:
        """Gradients of query, key and value; those of earlier keys and values go to the store."""
        late, looking = (x[:, :, : len(self.looking)] for x in (dout, query))
        arriving = self.shared.start_backward(late, looking) if self.shared else None
        pieces = [
            self.rectangles.backward(do, q, tokens, k, v, tokens)
            for tokens, (do, q, k, v) in self._own(dout, query, key, value)
        ]
        for part in self._parts():
            runs = [self.rectangles.backward(late, looking, self.looking, k, v, tokens) for tokens, k, v in _runs(part)]
            for dq, _, _ in runs:
                pieces[0][0].add_(dq)
            found = (_joined([dk for _, dk, _ in runs]), _joined([dv for _, _, dv in runs]))
            self.store.add(self.layer, self.number, part, found)
        if self.shared and arriving:
            self.shared.finish_backward(arriving, pieces[0][0])
        dq, dk, dv = (_joined(list(gradients)) for gradients in zip(*pieces, strict=True))
        later = self.store.take(self.layer, self.number, self.index) if self.layout.slices > 1 else None
        return (dq, dk, dv) if later is None else (dq, dk.add_(later[0]), dv.add_(later[1]))

    def _own(self, *tensors: Tensor) -> Iterator[tuple[range, list[Tensor]]]:
        """By segment of the slice: numbers of its tokens, and its rows of ``tensors``."""
        for piece in self.segments:
            tokens = range(self.low + piece.begin, self.low + piece.end)
            yield tokens, [x[:, :, piece.begin : piece.end] for x in tensors]

    def _parts(self) -> list[Part]:
        return self.store.parts(self.layer, self.number, self.here) if self.here else []


class _Shared:
    """The exchange of one call, from the side of the giver or of the helper (see :mod:`port`).

    As in softmax attention; the tables travel too, since the helper is at another layer, and their gradients back.
    """

    def __init__(self, deal: Deal, work: _Work, query: Tensor, bias: RelativeBias | None) -> None:
        self.deal = deal
        self.store, self.layer, self.number = work.store, work.layer, work.number
        self.biases = work.biases
        self.tables = [] if bias is None else [x.detach() for x in (bias.by_position, bias.by_time) if x is not None]
        _, heads, _, width = query.shape
        self.key = ((deal.batch, heads, len(deal.tokens), width), query.dtype)
        self.query = ((deal.batch, heads, deal.queries, width), query.dtype)

    def start_forward(self, query: Tensor) -> Arriving:
        """Sends what the helper needs, or starts to receive it."""
        if not self.deal.gives:
            return self._receive(self.key, self.key, self.query, *map(_spec, self.tables))
        self._send(*self._moved(), query, *self.tables)
        return self._receive(self.query)

    def finish_forward(self, arriving: Arriving, out: Tensor) -> None:
        """Adds what the helper found; or attends for the giver and sends it."""
        if self.deal.gives:
            out.add_(arriving.wait()[0])
            return
        key, value, query, *tables = arriving.wait()
        rectangles = self._foreign(tables, query)
        self._send(rectangles.forward(query, self._queries, key, value, self.deal.tokens).to(query.dtype))

    def start_backward(self, dout: Tensor, query: Tensor) -> Arriving:
        """As :meth:`start_forward`."""
        if not self.deal.gives:
            return self._receive(self.key, self.key, self.query, self.query, *map(_spec, self.tables))
        self._send(*self._moved(), query, dout, *self.tables)
        return self._receive(self.query, self.key, self.key, *map(_spec, self.biases.gradients))

    def finish_backward(self, arriving: Arriving, dq: Tensor) -> None:
        """Adds what the helper found to ``dq``, the store and the tables; or computes it for the giver and sends it."""
        if not self.deal.gives:
            key, value, query, dout, *tables = arriving.wait()
            rectangles = self._foreign(tables, query)
            found = rectangles.backward(dout, query, self._queries, key, value, self.deal.tokens)
            self._send(*(x.to(query.dtype) for x in found), *rectangles.biases.gradients)
            return
        found_dq, dk, dv, *of_tables = arriving.wait()
        dq.add_(found_dq)
        self.store.add_tokens(self.layer, self.number, self.deal.tokens, (dk, dv))
        for total, gradient in zip(self.biases.gradients, of_tables, strict=True):
            total.add_(gradient)

    @property
    def _queries(self) -> range:
        """Tokens of the giver's microbatch that look back."""
        low = self.deal.port.partner.layout.bounds[self.deal.port.partner_slice]
        return range(low, low + self.deal.queries)

    def _foreign(self, tables: list[Tensor], query: Tensor) -> Rectangles:
        """For the helper: with the giver's tables, times and length."""
        partner = self.deal.port.partner
        bias = RelativeBias(tables[0], tables[1] if len(tables) > 1 else None) if tables else None
        return _rectangles(Biases(bias, partner.times, query), partner.layout, query)

    def _moved(self) -> Pair:
        return self.store.gather(self.layer, self.number, self.deal.tokens)

    def _send(self, *tensors: Tensor) -> None:
        self.deal.port.send([x.contiguous() for x in tensors])

    def _receive(self, *specs: tuple[tuple[int, ...], torch.dtype]) -> Arriving:
        return self.deal.port.receive(specs)


def _rectangles(biases: Biases, layout: Layout, like: Tensor) -> Rectangles:
    return Rectangles(biases, layout.divisor, CPU_EDGE if like.device.type == "cpu" else DEVICE_EDGE)


def _runs(part: Part) -> Iterator[tuple[range, Tensor, Tensor]]:
    """(tokens, key, value) of each run of consecutive tokens in ``part``, in order of rows."""
    row = 0
    for tokens in part.tokens:
        last = row + len(tokens)
        yield tokens, part.key[:, :, row:last], part.value[:, :, row:last]
        row = last


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _spec(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
