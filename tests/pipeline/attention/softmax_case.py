"""One layer of softmax attention over the microbatches of a step, sliced in a pipeline's order and whole."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thresher.pipeline.attention.port import Port
from thresher.pipeline.attention.regions import plan_regions
from thresher.pipeline.attention.sliced import SlicedContext
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.attention.whole import WholeContext
from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.ops import Kind, Op, Schedule

LAYER = 5
Outcome = list[list[Tensor]]
"""By microbatch: output [B, H, S, E], and the gradient of its queries, keys and values [B, S, H + 2 G, E]."""


def microbatch_of(layout: Layout, device: str = "cpu") -> Microbatch:
    ids = torch.zeros(layout.batch, layout.tokens, dtype=torch.int64, device=device)
    return Microbatch(layout, ids, ids, ids.float())


def slimpipe(microbatches: int, slices: int, stages: int = 2) -> Schedule:
    """One chunk per rank; rank 0 has the most slices live."""
    return build_schedule(stages, 1, microbatches, max(slices, stages))


class Step:
    """Queries, keys and values of a step, [B, *, S, E] as views of [B, S, H + 2 G, E], and gradients of outputs."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        heads: tuple[int, int] = (4, 2),
        width: int = 8,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.layouts, (query, key) = list(layouts), heads
        self.microbatches = [microbatch_of(layout, device) for layout in layouts]
        self.heads = (query, key, key)

        def drawn(layout: Layout, count: int) -> Tensor:
            shape = (layout.batch, layout.tokens, count, width)
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype)

        self.fused = [drawn(layout, sum(self.heads)).requires_grad_() for layout in layouts]
        self.douts = [drawn(layout, query).transpose(1, 2) for layout in layouts]

    def inputs(self, number: int, first: int = 0, last: int | None = None) -> list[Tensor]:
        fused = self.fused[number][:, first:last].contiguous()
        return [x.transpose(1, 2) for x in fused.split(self.heads, 2)]

    def whole(self) -> Outcome:
        outcome = []
        for number, microbatch in enumerate(self.microbatches):
            context = WholeContext(microbatch, number, seed=0, step=0, training=True)
            out = context.attend(LAYER, *self.inputs(number))
            (gradient,) = torch.autograd.grad(out, self.fused[number], self.douts[number])
            outcome.append([out.detach(), gradient])
        return outcome

    def sliced(
        self,
        schedule: Schedule | None = None,
        ports: "dict[tuple[Kind, int, int], Port] | None" = None,
        again: bool = False,
        store: KVStore | None = None,
    ) -> Outcome:
        """As rank 0 of ``schedule``; ``ports`` by kind, microbatch and slice; ``again``: with recomputation."""
        schedule = schedule or slimpipe(len(self.layouts), self.layouts[0].slices)
        store = store or KVStore(plan_regions(schedule, 0, self.layouts)[0])
        live: dict[tuple[int, int], tuple[SlicedContext, Tensor]] = {}
        outs: list[list[Tensor]] = [[] for _ in self.layouts]
        for fused in self.fused:
            fused.grad = None
        for op in schedule.of(0, Kind.FORWARD, Kind.BACKWARD):
            place, port = (op.microbatch, op.slice), (ports or {}).get((op.kind, op.microbatch, op.slice))
            if op.kind is Kind.FORWARD:
                live[place] = self.forward(store, op, port, again)
                outs[op.microbatch].append(live[place][1].detach())
            else:
                self.backward(*live.pop(place), op, port)
                store.release(*place)
        store.require_empty()
        return [[torch.cat(o, 2), f.grad] for o, f in zip(outs, self.fused, strict=True)]

    def forward(
        self, store: KVStore, op: Op, port: Port | None = None, again: bool = False
    ) -> tuple[SlicedContext, Tensor]:
        number, index = op.microbatch, op.slice
        bounds = self.layouts[number].bounds
        context = SlicedContext(store, self.microbatches[number], number, index, seed=0, step=0, training=True)
        context.port = port
        inputs = (LAYER, *self.inputs(number, bounds[index], bounds[index + 1]))
        out = checkpoint(context.attend, *inputs, use_reentrant=False) if again else context.attend(*inputs)
        context.port = None
        return context, out

    def backward(self, context: SlicedContext, out: Tensor, op: Op, port: Port | None = None) -> None:
        bounds = self.layouts[op.microbatch].bounds
        context.port = port
        context.again()
        out.backward(self.douts[op.microbatch][:, :, bounds[op.slice] : bounds[op.slice + 1]])
        context.port = None


def largest_difference(found: Outcome, expected: Outcome) -> float:
    return max(
        float((a.double() - b.double()).abs().max())
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
