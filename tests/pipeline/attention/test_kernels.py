"""Kernels against attention under autograd, their backward by parts, and the merge of partial results."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from thresher.pipeline.attention import kernels
from thresher.pipeline.attention.kernels import Cpu, CudaHalf, CudaSingle, Kernels, Plain, choose, merge

SCALE = 0.3
SHAPES = [(1, 1, 1), (1, 1, 3), (3, 5, 5), (2, 5, 9), (1, 300, 300), (1, 70, 600)]
"""Batch, queries, keys."""


def drawn(
    batch: int, queries: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query from a fused projection, key and value from the middle of a pool, gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, queries, 2, heads[0], width, generator=draw, dtype=torch.float64).to(dtype)
    pools = torch.randn(2, batch, heads[1], keys + 5, width, generator=draw, dtype=torch.float64).to(dtype)
    query, dout = fused.unbind(2)
    return [query.transpose(1, 2), *pools[:, :, :, 2 : keys + 2], dout.transpose(1, 2)]


def autograd(query: Tensor, key: Tensor, value: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    q, k, v = leaves
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    out = scores.softmax(-1) @ v
    return [out.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(out, leaves, dout)]


def computed(how: Kernels, query: Tensor, key: Tensor, value: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """As :func:`autograd`; backward is given an output that lies as [B, H, T, E]."""
    out, lse = how.flash(query, key, value, causal, SCALE)
    out = out.contiguous()
    return [out, lse, *how.backward(dout, query, key, value, out, lse, causal, SCALE)]


def differences(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True))


class Aten:
    """Stands in for the CUDA kernels of aten: computes plainly, and insists on what those insist on."""

    def __init__(self) -> None:
        self.plain = Plain()
        self._scaled_dot_product_efficient_attention_backward = self.efficient_backward
        self._scaled_dot_product_flash_attention_backward = self.flash_backward

    def _scaled_dot_product_flash_attention(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, *, scale: float
    ) -> tuple[Tensor | None, ...]:
        assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 for x in (query, key, value))
        return *self.plain.flash(query, key, value, causal, scale), None, None

    def flash_backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *others: object,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 for x in (dout, query, key, value, out))
        assert lse.is_contiguous()
        assert others[2:4] == (query.shape[2], key.shape[2])
        return self.plain.backward(dout, query, key, value, out, lse, bool(others[5]), scale)

    def _scaled_dot_product_efficient_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: None,
        wants_lse: bool,
        dropout: float,
        causal: bool,
        *,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert query.shape[1] == key.shape[1] == value.shape[1]
        assert all(x.shape[-1] % 4 == 0 and x.stride(-1) == 1 for x in (query, key, value))
        assert wants_lse
        out, lse = self.plain.flash(query, key, value, causal, scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)

    def efficient_backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: None,
        out: Tensor,
        lse: Tensor,
        *others: object,
        scale: float,
    ) -> tuple[Tensor | None, ...]:
        assert query.shape[1] == key.shape[1] == lse.shape[1] == out.shape[1] == dout.shape[1]
        assert all(x.shape[-1] % 4 == 0 and x.stride(-1) == 1 for x in (dout, query, key, value, out))
        assert out.transpose(1, 2).is_contiguous()
        assert lse.shape[-1] % 32 == 0
        assert lse.is_contiguous()
        lse = lse[..., : query.shape[2]]
        return *self.plain.backward(dout, query, key, value, out, lse, bool(others[4]), scale), None


@pytest.mark.parametrize("width", [4, 7, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", [Cpu(), Plain(), CudaHalf(), CudaSingle()], ids=["cpu", "plain", "half", "single"])
def test_equals_autograd(
    how: Kernels,
    shape: tuple[int, int, int],
    heads: tuple[int, int],
    width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isinstance(how, CudaHalf | CudaSingle):
        monkeypatch.setattr(kernels, "_aten", Aten())
    tensors = drawn(*shape, heads, width)
    for causal in (False, True)[: 1 + (shape[1] == shape[2])]:
        assert differences(computed(how, *tensors, causal), autograd(*tensors, causal)) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("how", [Cpu(), Plain()], ids=["cpu", "plain"])
def test_lower_precision(how: Kernels, dtype: torch.dtype, bound: float) -> None:
    tensors = drawn(2, 70, 70, (4, 2), 8, dtype)
    found = computed(how, *tensors, True)
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype]
    assert differences(found, autograd(*(x.double() for x in tensors), True)) < bound


@pytest.mark.parametrize("how", [Cpu(), Plain()], ids=["cpu", "plain"])
def test_parts_with_the_merged_result_add_up(how: Kernels) -> None:
    query, key, value, dout = tensors = drawn(2, 6, 11, (4, 2), 8)
    halves = [(key[:, :, :7], value[:, :, :7]), (key[:, :, 7:], value[:, :, 7:])]
    (out, lse), (other, other_lse) = (how.flash(query, *half, False, SCALE) for half in halves)
    merge(out, lse, other, other_lse)
    parts = [how.backward(dout, query, *half, out, lse, False, SCALE) for half in halves]
    found = [out, lse, parts[0][0] + parts[1][0], *(torch.cat([parts[0][i], parts[1][i]], 2) for i in (1, 2))]
    assert differences(found, autograd(*tensors, False)) < 1e-12


@pytest.mark.parametrize("gap", [0.0, 1.0, 80.0, 1e4, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merge_of_distant_parts(gap: float, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    out, other = torch.full((1, 1, 2, 3), 2.0, dtype=dtype), torch.full((1, 1, 2, 3), 4.0, dtype=dtype)
    lse, other_lse = torch.tensor([[[5.0, -gap]]], dtype=wide), torch.tensor([[[5.0 - gap, 0.0]]], dtype=wide)
    merge(out, lse, other, other_lse)
    share = 1 / (1 + math.exp(gap)) if gap < 700 else 0.0
    expected = torch.tensor([2 + 2 * share, 4 - 2 * share], dtype=torch.float64)
    assert torch.allclose(out[0, 0, :, 0].double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=0)
    more = math.log1p(math.exp(-gap))
    assert torch.allclose(lse[0, 0].double(), torch.tensor([5 + more, more]).double(), rtol=1e-6, atol=1e-12)


def test_merge_of_rows_without_keys_is_a_row_without_keys() -> None:
    out, lse = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -math.inf)
    merge(out, lse, out.clone(), lse.clone())
    assert out.tolist() == [[[[0.0, 0.0]]]]
    assert lse.item() == -math.inf


def test_a_gradient_that_is_no_number_is_not_hidden() -> None:
    out, lse = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)
    merge(out, lse, torch.full_like(out, math.nan), torch.full_like(lse, math.nan))
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize(
    ("device", "dtype", "kind"),
    [
        ("cpu", torch.float64, Cpu),
        ("cpu", torch.bfloat16, Cpu),
        ("cuda", torch.bfloat16, CudaHalf),
        ("cuda", torch.float16, CudaHalf),
        ("cuda", torch.float32, CudaSingle),
        ("cuda", torch.float64, Plain),
        ("meta", torch.float32, Plain),
    ],
)
def test_choice_by_device_and_dtype(device: str, dtype: torch.dtype, kind: type[Kernels]) -> None:
    like = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert type(choose(like)) is kind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("width", [4, 7, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda(
    shape: tuple[int, int, int], heads: tuple[int, int], width: int, dtype: torch.dtype, bound: float
) -> None:
    tensors = [x.cuda() for x in drawn(*shape, heads, width, dtype)]
    for causal in (False, True)[: 1 + (shape[1] == shape[2])]:
        found = [x.cpu() for x in computed(choose(tensors[0]), *tensors, causal)]
        assert differences(found, autograd(*(x.cpu().double() for x in tensors), causal)) < bound
