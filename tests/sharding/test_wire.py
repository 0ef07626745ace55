"""Precision on the wire: what codecs do to numbers, to numbers that are none, and to bytes."""

import pytest
import torch
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from thresher.errors import ConfigError, PlanError
from thresher.settings import parse
from thresher.sharding.plan import Plan, Shard, ShardingConfig, TablePlan, WireConfig
from thresher.sharding.wire import Cast, GroupedInt8, codecs

EMPTY = Plan(world=1, local_world=1, tables=())
X = torch.tensor([1.0, -2.5, 1e-3, 65504.0, 70000.0, float("inf"), float("nan")])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_round_to_nearest_and_do_not_hide_what_is_not_finite(dtype: torch.dtype) -> None:
    codec = Cast(dtype)
    sent = codec.encode(X)
    assert sent.dtype == codec.quantized_dtype == dtype
    got = codec.decode(sent)
    assert torch.equal(got, X.to(dtype).float()) or got[-1].isnan()
    assert torch.equal(got.isfinite(), X.to(dtype).isfinite())
    assert not got[5].isfinite()
    assert not got[6].isfinite()


def test_small_gradients_survive_fp16() -> None:
    small = torch.tensor([3e-8, 1e-6, -2e-5])
    assert Cast(torch.float16).decode(Cast(torch.float16).encode(small))[0] != pytest.approx(3e-8, rel=0.1)
    scaled = Cast(torch.float16, 1024.0)
    torch.testing.assert_close(scaled.decode(scaled.encode(small)), small, rtol=5e-3, atol=0)


def test_int8_keeps_every_number_within_half_a_level_of_its_group() -> None:
    codec, x = GroupedInt8(), torch.randn(10, 64) * torch.tensor([1e-6, 1.0, 1e4]).repeat(10)[:10].unsqueeze(1)
    sent = codec.encode(x, codec.create_context())
    assert sent.dtype == torch.uint8
    assert sent.numel() == codec.calc_quantized_size(640) == 640 // 32 * 36
    groups = x.view(-1, 32)
    error = (codec.decode(sent).view(-1, 32) - groups).abs()
    assert bool((error <= groups.abs().amax(1, keepdim=True) / 127 * 0.5001).all())


def test_int8_keeps_zeros_and_what_is_not_finite() -> None:
    codec, x = GroupedInt8(), torch.zeros(4, 32)
    x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), 2.0
    got = codec.decode(codec.encode(x)).view(4, 32)
    assert not got[0].any()
    assert not got[1].isfinite().all()
    assert not got[2].isfinite().all()
    assert torch.equal(got[3], x[3])


def test_pooled_vectors_are_padded_to_whole_groups() -> None:
    codec = GroupedInt8()
    context = codec.create_context()
    assert codec.padded_size(torch.zeros(2, 48), [16, 48, 0], 1, context) == (64, 16)
    assert context.padded_dim_sum_per_rank == [32, 64, 0]


def kinds(found: QuantizedCommCodecs) -> tuple[torch.dtype, torch.dtype]:
    return found.forward.quantized_dtype, found.backward.quantized_dtype


def test_each_exchange_gets_the_precision_asked_for() -> None:
    assert codecs(WireConfig(), EMPTY) == {}
    half = codecs(WireConfig(forward="fp16", backward="bf16"), EMPTY)
    assert {name: kinds(found) for name, found in half.items()} == {
        op.name: (torch.float16, torch.bfloat16) for op in CommOp
    }
    eight = codecs(WireConfig(forward="int8"), EMPTY)
    assert {name: kinds(found)[0] for name, found in eight.items()} == {
        "POOLED_EMBEDDINGS_ALL_TO_ALL": torch.uint8,
        "POOLED_EMBEDDINGS_REDUCE_SCATTER": torch.float16,
        "SEQUENCE_EMBEDDINGS_ALL_TO_ALL": torch.uint8,
    }


def plan(cols: int) -> Plan:
    shard = Shard(rank=0, row0=0, rows=5, col0=0, cols=cols, bytes=0)
    table = TablePlan(
        module="s", table="item", rows=5, dim=cols, sharding_type="table_wise", kernel="fused", shards=(shard,)
    )
    return Plan(world=1, local_world=1, tables=(table,))


def test_int8_sequences_use_groups_that_fit_their_width() -> None:
    found = codecs(WireConfig(forward="int8"), plan(16), ["s.item"])["SEQUENCE_EMBEDDINGS_ALL_TO_ALL"].forward
    assert found.calc_quantized_size(48) == 3 * 20
    with pytest.raises(PlanError, match=r"shards of 12 columns, int8 needs multiples of 8. Send fp16 or bf16"):
        codecs(WireConfig(forward="int8"), plan(12), ["s.item"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"forward": "fp8"}, "wire.forward"),
        ({"backward": "int8"}, "wire.backward"),
        ({"gradient_scale": 0}, "wire.gradient_scale"),
    ],
)
def test_other_precisions_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ShardingConfig, {"wire": values}, "run.yaml")
