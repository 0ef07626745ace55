"""Layers that compute parts of themselves again: the same gradients, fewer bytes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.pipeline.attention.one_rank import one_rank_store
from thresher.errors import ConfigError
from thresher.pipeline.attention.sliced import SlicedContext
from thresher.pipeline.context import RelativeBias, SliceContext, TrunkLayer
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.meter import SavedBytes
from thresher.pipeline.runtime.recompute import Recompute, recomputed, require_recomputable
from thresher.pipeline.runtime.weights import SplitLinear, WeightQueue, attach_queue

WIDTH, HEADS, TOKENS, SLICES = 16, 2, 64, 4


class Parted(TrunkLayer):
    """Norm, attention, network, with dropout in two places."""

    def __init__(self, index: int, pointwise: bool) -> None:
        super().__init__()
        self.index, self.mixes = index, 0
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inputs, self.outputs = SplitLinear(WIDTH, 3 * WIDTH), SplitLinear(WIDTH, WIDTH)
        self.wide, self.narrow = SplitLinear(WIDTH, 4 * WIDTH), SplitLinear(4 * WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(HEADS, 8)) if pointwise else None

    def project(self, values: Tensor, context: SliceContext) -> tuple[Tensor, ...]:
        split = self.inputs(self.first(values)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return tuple(split.unbind(0))

    def mix(self, projected: tuple[Tensor, ...], context: SliceContext) -> Tensor:
        self.mixes += 1
        if self.table is None:
            return context.attend(self.index, *projected)
        return context.attend_pointwise(self.index, *projected, RelativeBias(self.table))

    def finish(self, values: Tensor, mixed: Tensor, context: SliceContext) -> Tensor:
        values = values + context.drop(self.outputs(mixed.transpose(1, 2).flatten(2)), 0.2, self.index, 0)
        return values + context.drop(self.narrow(F.gelu(self.wide(self.second(values)))), 0.2, self.index, 1)

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        return self.finish(values, self.mix(self.project(values, context), context), context)


class Run:
    """Slices through two layers and back.

    Attributes:
        layers: as they are afterwards.
        gradients: of the input, then of every parameter.
        bytes: saved at the peak, without parameters.
    """

    def __init__(self, kind: Recompute, pointwise: bool, autocast: bool = False, waits: bool = False) -> None:
        torch.manual_seed(5)
        self.layers = nn.ModuleList(Parted(index, pointwise) for index in range(2))
        self.queue = WeightQueue()
        attach_queue(self.layers, self.queue if waits else None)
        layout = Layout(even_bounds(TOKENS, SLICES), 2)
        ids = torch.zeros(2, TOKENS, dtype=torch.int64)
        microbatch = Microbatch(layout, ids, ids, ids.float())
        store = one_rank_store([layout])
        meter = SavedBytes(self.layers.parameters())
        whole = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
        outs = []
        for index in range(SLICES):
            context = SlicedContext(store, microbatch, 0, index, seed=1, step=2, training=True)
            values = microbatch.cut(whole, index).clone()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), meter:
                for layer in self.layers:
                    values = recomputed(layer, values, context, kind)
            outs.append((values, context))
        self.bytes = meter.peak_bytes
        for index in reversed(range(SLICES)):
            values, context = outs.pop()
            context.again()
            self._backward(values, index, waits)
            store.release(0, index)
        assert meter.live_bytes == 0
        self.gradients = [whole.grad, *(p.grad for p in self.layers.parameters())]

    def _backward(self, out: Tensor, index: int, waits: bool) -> None:
        if not waits:
            out.square().sum().backward()
            return
        with self.queue.collect((0, index)):
            out.square().sum().backward()
        self.queue.run((0, index))


@pytest.mark.parametrize("waits", [False, True], ids=["at-once", "later"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("pointwise", [False, True], ids=["softmax", "pointwise"])
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_gradients_are_the_same_bit_for_bit(kind: Recompute, pointwise: bool, autocast: bool, waits: bool) -> None:
    plain, found = Run("none", pointwise, autocast), Run(kind, pointwise, autocast, waits)
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients, found.gradients, strict=True))


@pytest.mark.parametrize("pointwise", [False, True], ids=["softmax", "pointwise"])
def test_what_stays(pointwise: bool) -> None:
    """In widths per token and layer: the input 1, with selective also query, key, value and attention's output."""
    token = 2 * TOKENS * WIDTH * 4 * 2
    full, selective, none = (Run(kind, pointwise).bytes / token for kind in ("full", "selective", "none"))
    logsumexp = 0 if pointwise else HEADS / WIDTH
    assert full == 1
    assert selective == pytest.approx(1 + 2 + 2 + logsumexp)
    assert none > 2 * selective


def test_attention_runs_again_only_in_full() -> None:
    runs = {kind: [layer.mixes for layer in Run(kind, False).layers] for kind in ("none", "selective", "full")}
    assert runs == {"none": [SLICES] * 2, "selective": [SLICES] * 2, "full": [2 * SLICES] * 2}


class Whole(TrunkLayer):
    index = 3

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        return values * 2


def test_a_layer_without_parts_cannot_keep_its_attention() -> None:
    expected = r"pipeline\.recompute: Whole cannot keep its attention alone.*Use 'full' or 'none', or give the layer"
    with pytest.raises(ConfigError, match=expected):
        require_recomputable(Whole(), "selective")
    with pytest.raises(ConfigError, match=expected):
        recomputed(Whole(), torch.ones(1), None, "selective")
    require_recomputable(Whole(), "full")
    require_recomputable(Parted(0, False), "selective")


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'some' is no kind of recomputation\. Use one of none, full, selective"):
        recomputed(Whole(), torch.ones(1), None, "some")
