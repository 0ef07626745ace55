"""Attention kernels that also give the logsumexp of each row, their backward, and the merge of partial results.

    flash(q, k, v) -> out, lse          backward(dout, q, k, v, out, lse) -> dq, dk, dv

The backward of a part of the keys is exact when it is given the *merged* out and lse: softmax over all keys is
exp(score - lse), and what a row of dout means for its scores depends on out alone (arXiv:2205.14135, appendix B.2).

Shapes: query [B, H, T, E]; key and value [B, G, S, E] with G dividing H, of any strides with contiguous last dim;
lse [B, H, T] in fp32, fp64 where the query is fp64. ``causal`` needs S = T.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

Triple = tuple[Tensor, Tensor, Tensor]
_aten = torch.ops.aten


class Kernels(ABC):
    """One implementation."""

    @abstractmethod
    def flash(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """(out [B, H, T, E], lse [B, H, T])."""

    @abstractmethod
    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> Triple:
        """Gradients of query, key and value, in their shapes and dtypes, as far as these keys go."""


class Cpu(Kernels):
    """aten's flash attention for CPU, which groups query heads itself: fp64, fp32, bf16, fp16."""

    def flash(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> Triple:
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(dout, query, key, value, out, lse, 0.0, causal, scale=scale)
        return dq, dk, dv


class CudaHalf(Kernels):
    """aten's flash attention for CUDA, which groups query heads itself: fp16 and bf16, width a multiple of 8."""

    def flash(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        width = query.shape[-1]
        query, key, value = (_widen(x, 8) for x in (query, key, value))
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return out[..., :width], lse

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> Triple:
        width, unused = query.shape[-1], torch.empty(0, dtype=torch.int64)
        lengths = (query.shape[2], key.shape[2])
        dout, query, key, value, out = (_widen(x, 8) for x in (dout, query, key, value, out))
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            *(dout, query, key, value, out, lse.contiguous()),
            *(None, None, *lengths, 0.0, causal, unused, unused),
            scale=scale,
        )
        dq, dk, dv = (x[..., :width] for x in gradients)
        return dq, dk, dv


class CudaSingle(Kernels):
    """aten's memory-efficient attention for CUDA: fp32 without rounding to half, width a multiple of 4.

    It knows no groups: for unmasked calls the group is folded into the query length, for causal ones, which see one
    slice only, keys and values are repeated. Its backward takes rows of the logsumexp padded to 32, and takes it for
    granted that ``out`` lies as [B, T, H, E].
    """

    def flash(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        heads, width = query.shape[1], query.shape[-1]
        query, key, value = _pair_heads(_widen(query, 4), _widen(key, 4), _widen(value, 4), causal)
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        lse = lse[..., : query.shape[2]]
        return _unfold(out, heads)[..., :width], _unfold(lse.unsqueeze(-1), heads).squeeze(-1)

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> Triple:
        heads, groups, width = query.shape[1], key.shape[1], query.shape[-1]
        dout, query, key, value, out = (_widen(x, 4) for x in (dout, query, key, value, out))
        if not causal:
            dout, out, lse = (_fold(x, groups) for x in (dout, out, lse.unsqueeze(-1)))
            lse = lse.squeeze(-1)
        query, key, value = _pair_heads(query, key, value, causal)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        unused = torch.zeros((), dtype=torch.int64, device=query.device)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            *(dout, query, key, value, None, out, lse.contiguous(), unused, unused, 0.0),
            *([True, True, True, False], causal),
            scale=scale,
        )
        dk, dv = _grouped(dk, groups), _grouped(dv, groups)
        return _unfold(dq, heads)[..., :width], dk[..., :width], dv[..., :width]


class Plain(Kernels):
    """The same in plain torch operations: for every device and floating dtype; scores of all pairs at once."""

    def flash(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = _scores(query, key, causal, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        return (weights @ _spread(value, query)).to(query.dtype), lse

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> Triple:
        wide, groups = lse.dtype, key.shape[1]
        weights = (_scores(query, key, causal, scale) - lse.unsqueeze(-1)).exp()
        dout, out = dout.to(wide), out.to(wide)
        against = dout @ _spread(value, query).mT - (dout * out).sum(-1, keepdim=True)
        dscores = weights * against * scale
        dk, dv = _grouped(dscores.mT @ query.to(wide), groups), _grouped(weights.mT @ dout, groups)
        return (dscores @ _spread(key, query)).to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def choose(like: Tensor) -> Kernels:
    """The fastest exact kernels for the device and dtype of ``like``."""
    if like.device.type == "cpu" and like.dtype.is_floating_point:
        return Cpu()
    if like.device.type == "cuda" and like.dtype in (torch.float16, torch.bfloat16):
        return CudaHalf()
    if like.device.type == "cuda" and like.dtype == torch.float32:
        return CudaSingle()
    return Plain()


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Joins attention over two sets of keys: ``out`` [B, H, T, E] and ``lse`` [B, H, T] become those over both.

        lse = log(exp(lse_a) + exp(lse_b)),   out = out_a + sigmoid(lse_b - lse_a) (out_b - out_a)

    Nothing overflows, however far apart the two are; rows without keys on either side (-inf) count for nothing.
    """
    weight = torch.sigmoid(other_lse - lse).nan_to_num_(0.0).unsqueeze(-1)
    if out.dtype == weight.dtype:
        out.lerp_(other, weight)
    else:
        out.copy_(out.to(weight.dtype).lerp_(other.to(weight.dtype), weight))
    torch.logaddexp(lse, other_lse, out=lse)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ _spread(key, query).mT * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(future, -math.inf)
    return scores


def _spread(grouped: Tensor, query: Tensor) -> Tensor:
    """[B, G, S, E] as [B, H, S, E], each head of a group seeing the same, in the dtype of sums."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return grouped.to(wide).repeat_interleave(query.shape[1] // grouped.shape[1], 1)


def _widen(x: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last dim up to a multiple: they change neither scores nor gradients."""
    return F.pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x


def _pair_heads(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Triple:
    """As many query heads as key heads."""
    groups, share = key.shape[1], query.shape[1] // key.shape[1]
    if share == 1:
        return query, key, value
    if causal:
        return query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    return _fold(query, groups), key, value


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, H, S, E] summed over the heads of each group: [B, G, S, E]."""
    return x if x.shape[1] == groups else x.reshape(x.shape[0], groups, -1, *x.shape[2:]).sum(2)


def _fold(x: Tensor, groups: int) -> Tensor:
    """[B, H, T, E] as [B, G, H / G * T, E]."""
    return x if x.shape[1] == groups else x.reshape(x.shape[0], groups, -1, x.shape[3])


def _unfold(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    return x if x.shape[1] == heads else x.reshape(x.shape[0], heads, -1, x.shape[3])
