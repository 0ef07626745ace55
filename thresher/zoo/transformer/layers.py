"""The layers of a trunk: functions of one slice, whatever the cut."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.pipeline.context import RelativeBias, SliceContext, TrunkLayer
from thresher.pipeline.runtime.weights import SplitLinear
from thresher.zoo.transformer.rotary import rotate
from thresher.zoo.transformer.shape import TrunkShape

TIME_BUCKETS = 64
"""Of floor(log2(1 + seconds)): more than any two int64 times are apart."""

AFTER_ATTENTION, AFTER_NETWORK = 0, 1
"""Sites of dropout in a layer."""


def norm(shape: TrunkShape) -> nn.Module:
    """A fresh norm over hidden states."""
    return nn.RMSNorm(shape.dim, eps=1e-6) if shape.norm == "rms" else nn.LayerNorm(shape.dim)


def heads_apart(values: Tensor, heads: int) -> Tensor:
    """[B, H, T, E] from [B, T, H * E]."""
    apart: Tensor = values.unflatten(2, (heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return apart


class Attention(nn.Module):
    """Causal softmax attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        self.shape = shape
        self.project = SplitLinear(shape.dim, shape.dim + 2 * shape.kv_dim, bias=False)
        self.out = SplitLinear(shape.dim, shape.dim, bias=False)

    def heads(self, values: Tensor, context: SliceContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, E], keys and values [B, G, T, E] from [B, T, D]."""
        shape = self.shape
        parts = self.project(values).split([shape.dim, shape.kv_dim, shape.kv_dim], dim=2)
        query, key, value = (
            heads_apart(part, heads)
            for part, heads in zip(parts, (shape.heads, shape.kv_heads, shape.kv_heads), strict=True)
        )
        if shape.positions == "rotary":
            query, key = rotate(query, context.positions), rotate(key, context.positions)
        return query, key, value

    def joined(self, mixed: Tensor) -> Tensor:
        """[B, T, D] from [B, H, T, E]."""
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Network(nn.Module):
    """Two matrices with GELU between them, or SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        self.gated = shape.activation == "swiglu"
        self.into = SplitLinear(shape.dim, shape.ffn * (2 if self.gated else 1), bias=False)
        self.out = SplitLinear(shape.ffn, shape.dim, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        inner = self.into(values)
        if self.gated:
            gate, inner = inner.chunk(2, dim=2)
            inner = F.silu(gate) * inner
        else:
            inner = F.gelu(inner)
        out: Tensor = self.out(inner)
        return out


class SoftmaxLayer(TrunkLayer):
    """x + attention(norm(x)), then x + network(norm(x)); in parts, for selective recomputation."""

    def __init__(self, shape: TrunkShape, index: int) -> None:
        super().__init__()
        self.index, self.dropout = index, shape.dropout
        self.attention_norm, self.attention = norm(shape), Attention(shape)
        self.network_norm, self.network = norm(shape), Network(shape)

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        return self.finish(values, self.mix(self.project(values, context), context), context)

    def project(self, values: Tensor, context: SliceContext) -> tuple[Tensor, ...]:
        """Queries, keys and values."""
        return self.attention.heads(self.attention_norm(values), context)

    def mix(self, projected: tuple[Tensor, ...], context: SliceContext) -> Tensor:
        """Attention."""
        query, key, value = projected
        return context.attend(self.index, query, key, value)

    def finish(self, values: Tensor, mixed: Tensor, context: SliceContext) -> Tensor:
        """What follows attention."""
        values = values + context.drop(self.attention.joined(mixed), self.dropout, self.index, AFTER_ATTENTION)
        inner = self.network(self.network_norm(values))
        return values + context.drop(inner, self.dropout, self.index, AFTER_NETWORK)


class PointwiseLayer(TrunkLayer):
    """HSTU's layer (Zhai et al. 2024, arXiv:2402.17152, equations 1 to 3).

    u, v, q, k = silu(W1 norm(x));  x + W2 (norm(attention(q, k, v)) * u)
    """

    def __init__(self, shape: TrunkShape, index: int) -> None:
        super().__init__()
        self.index, self.shape = index, shape
        self.input_norm, self.mixed_norm = norm(shape), norm(shape)
        self.project = SplitLinear(shape.dim, 4 * shape.dim)
        self.out = SplitLinear(shape.dim, shape.dim)
        self.by_position = nn.Parameter(torch.zeros(shape.heads, shape.distances))
        self.by_time = nn.Parameter(torch.zeros(shape.heads, TIME_BUCKETS)) if shape.timed else None

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        gate, value, query, key = F.silu(self.project(self.input_norm(values))).chunk(4, dim=2)
        query, key, value = (heads_apart(part, self.shape.heads) for part in (query, key, value))
        if self.shape.positions == "rotary":
            query, key = rotate(query, context.positions), rotate(key, context.positions)
        bias = RelativeBias(self.by_position, self.by_time)
        mixed = context.attend_pointwise(self.index, query, key, value, bias).transpose(1, 2).flatten(2)
        added = self.out(self.mixed_norm(mixed) * gate)
        return values + context.drop(added, self.shape.dropout, self.index, AFTER_ATTENTION)


class Front(TrunkLayer):
    """What comes between the embedding and the first layer: learned positions, dropout."""

    def __init__(self, shape: TrunkShape, length: int) -> None:
        super().__init__()
        self.index, self.dropout = -1, shape.dropout
        self.positions = nn.Embedding(length, shape.dim) if shape.positions == "learned" else None

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        if self.positions is not None:
            values = values + self.positions(context.positions)
        return context.drop(values, self.dropout, self.index)


class Tail(TrunkLayer):
    """The last norm."""

    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        self.index, self.norm = -1, norm(shape)

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        out: Tensor = self.norm(values)
        return out
