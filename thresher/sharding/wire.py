"""Precision on the wire: how pooled vectors, sequence vectors and their gradients are sent between ranks.

TorchRec takes a codec for each of its exchanges. FBGEMM's codecs are not used: on CPU TorchRec replaces bf16 by fp16
(gloo can send both by now), fp16 and bf16 are clamped, which makes an infinite gradient a finite one, int8 loses NaN,
and batches must divide by 32. Here what is not finite arrives as something not finite, so that the step is refused.

    fp16, bf16   cast to nearest. Gradients in fp16 are multiplied by ``gradient_scale`` first, and divided afterwards.
    int8         groups of 32 numbers (fewer for sequences): x = s * q, q in -127..127, s = absmax / 127 in fp32

Where rows are cut, the exchange itself adds up the ranks' sums in the wire's format: int8 cannot, and is fp16 there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.distributed.types import CommOp, QuantizedCommCodec, QuantizedCommCodecs

from thresher.errors import PlanError
from thresher.sharding.plan import Plan, WireConfig

GROUP = 32
SMALLEST_GROUP = 8
_SCALE_BYTES = 4
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Cast(QuantizedCommCodec):  # type: ignore[misc]
    """Numbers of another type, times ``scale`` while they travel."""

    def __init__(self, dtype: torch.dtype, scale: float = 1.0) -> None:
        self._dtype, self._scale = dtype, scale

    @property
    def quantized_dtype(self) -> torch.dtype:
        """The wire's type."""
        return self._dtype

    def encode(self, input_tensor: Tensor, ctx: None = None) -> Tensor:
        """fp32 of any shape to the wire's type."""
        scaled = input_tensor if self._scale == 1.0 else input_tensor * self._scale
        return scaled.to(self._dtype)

    def decode(self, input_grad: Tensor, ctx: None = None) -> Tensor:
        """The wire's type to fp32."""
        received = input_grad.to(torch.float32)
        return received if self._scale == 1.0 else received / self._scale

    def calc_quantized_size(self, input_len: int, ctx: None = None) -> int:
        """As many numbers as there were."""
        return input_len

    def create_context(self) -> None:
        """Nothing to remember between encoding and decoding."""

    def padded_size(
        self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: None
    ) -> tuple[int, int]:
        """Columns as they are, no padding."""
        return input_tensor.shape[-1], 0


@dataclass
class Widths:
    """Columns of each rank after padding; TorchRec reads them under this name."""

    padded_dim_sum_per_rank: list[int] | None = None
    row_dim: int = 0


class GroupedInt8(QuantizedCommCodec):  # type: ignore[misc]
    """int8 in groups with a scale each: ``group`` bytes, then the fp32 scale's four.

    Args:
        group: numbers of a group; pooled vectors are padded to a multiple of it, sequences must be one already.
    """

    def __init__(self, group: int = GROUP) -> None:
        self._group = group

    @property
    def quantized_dtype(self) -> torch.dtype:
        """Bytes."""
        return torch.uint8

    def encode(self, input_tensor: Tensor, ctx: Widths | None = None) -> Tensor:
        """[n] uint8 from fp32 numbers."""
        if not input_tensor.numel():
            return input_tensor.new_empty(0, dtype=torch.uint8)
        groups = input_tensor.reshape(-1, self._group)
        scale = groups.abs().amax(1, keepdim=True) / 127
        whole = (groups / scale).nan_to_num_(0.0).round_().to(torch.int8)
        return torch.cat([whole.view(torch.uint8), scale.view(torch.uint8)], dim=1).view(-1)

    def decode(self, input_grad: Tensor, ctx: Widths | None = None) -> Tensor:
        """[n] fp32 from bytes."""
        groups = input_grad.view(-1, self._group + _SCALE_BYTES)
        scale = groups[:, self._group :].contiguous().view(torch.float32)
        return (groups[:, : self._group].view(torch.int8).to(torch.float32) * scale).view(-1)

    def calc_quantized_size(self, input_len: int, ctx: Widths | None = None) -> int:
        """Bytes of ``input_len`` numbers."""
        assert input_len % self._group == 0, f"{input_len} numbers are no groups of {self._group}"
        return input_len // self._group * (self._group + _SCALE_BYTES)

    def create_context(self) -> Widths:
        """Remembers how wide the ranks' parts were made."""
        return Widths()

    def padded_size(
        self, input_tensor: Tensor, dim_per_rank: list[int], my_rank: int, qcomm_ctx: Widths
    ) -> tuple[int, int]:
        """(columns, of which padding) of this rank's pooled vectors."""
        padded = [-(-dim // self._group) * self._group for dim in dim_per_rank]
        qcomm_ctx.padded_dim_sum_per_rank = padded
        return padded[my_rank], padded[my_rank] - dim_per_rank[my_rank]


def codecs(wire: WireConfig, plan: Plan, sequences: Sequence[str] = ()) -> dict[str, QuantizedCommCodecs]:
    """TorchRec's registry of codecs, by exchange; empty where everything is sent as fp32.

    Args:
        sequences: paths of the tables whose vectors are not pooled.

    Raises:
        PlanError: int8, and the shards of sequence tables are too narrow for it.
    """
    if wire.forward == wire.backward == "fp32":
        return {}
    back = Cast(_DTYPES[wire.backward], wire.gradient_scale if wire.backward == "fp16" else 1.0)
    if wire.forward != "int8":
        cast = Cast(_DTYPES[wire.forward])
        return {op.name: QuantizedCommCodecs(cast, back) for op in CommOp}
    return {
        CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name: QuantizedCommCodecs(GroupedInt8(), back),
        CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name: QuantizedCommCodecs(Cast(torch.float16), back),
        CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: QuantizedCommCodecs(GroupedInt8(_group(plan, sequences)), back),
    }


def _group(plan: Plan, sequences: Sequence[str]) -> int:
    """The largest group up to 32 that divides the width of every shard of sequence tables."""
    widths = [shard.cols for table in plan.tables if table.path in sequences for shard in table.shards]
    group = math.gcd(GROUP, *widths)
    if group < SMALLEST_GROUP:
        raise PlanError(
            f"sequence tables have shards of {', '.join(map(str, sorted(set(widths))))} columns, "
            f"int8 needs multiples of {SMALLEST_GROUP}",
            where="sharding.wire.forward",
            fix="send fp16 or bf16, or make the dims of sequence tables multiples of 16",
        )
    return group
