"""Our order, run by torch.distributed.pipelining with keys and values kept on the side, trains the same.

Nothing of Thresher but the order of forwards and backwards takes part: torch makes its own messages of it, and slices
reach earlier ones through :class:`SideBand` below.
"""

from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime
from torch.nn import functional as F

from tests.multi.harness import run_ranks
from tests.pipeline.runtime.tiny import SEED, VOCABULARY, WIDTH, Reference, Tiny, padded
from thresher.errors import ScheduleError
from thresher.pipeline.context import SliceContext
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import build_parts
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.ops import Kind

CPU = torch.device("cpu")
BUILD = Tiny(layers=4)
SHAPES = [(2, 1, 2, 4), (2, 2, 2, 4), (2, 2, 3, 6), (2, 1, 1, 3)]
TYPES = {Kind.FORWARD: _ComputationType.FORWARD, Kind.BACKWARD: _ComputationType.FULL_BACKWARD}


class _Prefix(torch.autograd.Function):
    """Attention of a slice to all slices on a list, which it joins; gradients of earlier ones wait on another list."""

    @staticmethod
    def forward(ctx, query, key, value, cache, gradients):
        cache.append((key.detach(), value.detach()))
        gradients.append([torch.zeros_like(key), torch.zeros_like(value)])
        ctx.save_for_backward(query)
        ctx.cache, ctx.gradients, ctx.number = cache, gradients, len(cache)
        return _attention(query, *(torch.cat(each, dim=2) for each in zip(*cache, strict=True)))

    @staticmethod
    def backward(ctx, gradient):
        assert len(ctx.cache) == ctx.number, "backward is not in reverse order"
        query = ctx.saved_tensors[0].detach().requires_grad_()
        history = [torch.cat(each, dim=2).requires_grad_() for each in zip(*ctx.cache, strict=True)]
        with torch.enable_grad():
            out = _attention(query, *history)
        to_query, *to_history = torch.autograd.grad(out, (query, *history), gradient)
        lengths = [key.shape[2] for key, _ in ctx.cache]
        for which, parts in enumerate(to_history):
            for waiting, part in zip(ctx.gradients, parts.split(lengths, dim=2), strict=True):
                waiting[which] += part
        ctx.cache.pop()
        return to_query, *ctx.gradients.pop(), None, None


def _attention(query, key, value):
    new, old = query.shape[2], key.shape[2]
    seen = torch.ones(new, old, dtype=torch.bool).tril(old - new)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


class SideBand(SliceContext):
    """Slices of one microbatch on one stage."""

    def __init__(self, layout):
        self.layout, self.slice = layout, 0
        self.lists = {}

    @property
    def positions(self):
        return self.layout.positions(self.slice)

    def attend(self, layer, query, key, value):
        return _Prefix.apply(query, key, value, *self.lists.setdefault(layer, ([], [])))

    def attend_pointwise(self, layer, query, key, value, bias):
        raise NotImplementedError

    def drop(self, values, share, layer, site=0):
        return values


class Stage(nn.Module):
    """One stage as torch knows it; parameters have the names they have in :class:`Reference`."""

    def __init__(self, number, stages, layouts):
        super().__init__()
        each = BUILD.layers // stages
        first, last = number == 0, number == stages - 1
        self.front = BUILD.front() if first else None
        self.layers = nn.ModuleDict({str(i): BUILD.layer(i) for i in range(number * each, (number + 1) * each)})
        self.tail = BUILD.tail() if last else None
        self.embedding = nn.Parameter(BUILD.table("embedding", 0, VOCABULARY, CPU)) if first else None
        self.head = nn.Parameter(BUILD.table("head", 0, VOCABULARY, CPU)) if last else None
        self.contexts = [SideBand(layout) for layout in layouts]

    def forward(self, values, microbatch, index):
        context = self.contexts[microbatch]
        context.slice = index
        if self.embedding is not None:
            values = F.embedding(values, self.embedding)
        for layer in (self.front, *self.layers.values(), self.tail):
            values = values if layer is None else layer(values, context)
        return values if self.head is None else values @ self.head.t()


def by_torch(rank, world, shape):
    """Gradients of what ``rank`` holds, by name; torch follows the order of our schedule."""
    stages, chunks, count, slices = shape
    schedule, given = build_schedule(*shape), padded(count, slices)
    total = stages * chunks
    tokens = given[0].layout.length(0)
    modules = [Stage(chunk * world + rank, total, [one.layout for one in given]) for chunk in range(chunks)]
    hidden = torch.zeros(2, tokens, WIDTH, dtype=torch.float64)
    parts = []
    for chunk, module in enumerate(modules):
        number = chunk * world + rank
        enters = torch.zeros(2, tokens, dtype=torch.int64) if number == 0 else hidden.clone().requires_grad_()
        leaves = torch.zeros(2, tokens, VOCABULARY, dtype=torch.float64) if number == total - 1 else hidden
        parts.append(PipelineStage(module, number, total, CPU, input_args=enters, output_args=leaves.requires_grad_()))
    weight = sum(float(one.weights.sum()) for one in given)

    def loss(logits, target):
        each = F.cross_entropy(logits.flatten(0, 1), target[..., 0].flatten().long(), reduction="none")
        return (each * target[..., 1].flatten()).sum() / weight

    def piece(microbatch, index, name):
        return given[microbatch].cut(getattr(given[microbatch], name), index)

    runtime = _PipelineScheduleRuntime(parts, count * slices, loss_fn=loss, scale_grads=False)
    runtime._prepare_schedule_with_comms(actions_of(schedule))
    pieces = [(k, i) for k in range(count) for i in range(slices)]
    inputs = [(piece(k, i, "inputs"),) if rank == 0 else () for k, i in pieces]
    targets = [torch.stack([piece(k, i, "targets").double(), piece(k, i, "weights")], -1) for k, i in pieces]
    numbers = [{"microbatch": k, "index": i} for k, i in pieces]
    for part in parts:
        part.has_backward = True
    runtime._step_microbatches(inputs, numbers, targets, [])
    assert not any(lists for module in modules for c in module.contexts for pair in c.lists.values() for lists in pair)
    renamed = {"embedding": "embedding.weight", "head": "head.weight"}
    return {renamed.get(name, name): p.grad for module in modules for name, p in module.named_parameters()}


def actions_of(schedule):
    """Forwards and backwards by rank, as torch spells them: every slice is a microbatch of its own."""
    shape = schedule.shape
    return {
        rank: [
            _Action(shape.stage(rank, op.chunk), TYPES[op.kind], op.microbatch * shape.slices + op.slice)
            for op in schedule.of(rank, *TYPES)
        ]
        for rank in range(shape.stages)
    }


def by_us(rank, world, shape, build=BUILD):
    """The same from Thresher's runtime, attention shared wherever it can be."""
    schedule = build_schedule(*shape, exchange=ExchangeRule(forced=True))
    parts = build_parts(build, schedule.shape, rank, CPU)
    groups = make_groups(schedule, [range(world)], timedelta(seconds=60))
    options = RuntimeOptions(timeout=timedelta(seconds=60), seed=SEED)
    PipelineRuntime(schedule, parts, groups, options).step(padded(shape[2], shape[3]), step=0)
    found = {name: p.grad for stage in parts.stages for name, p in stage.named_parameters()}
    if parts.embedding is not None:
        found["embedding.weight"] = parts.embedding.weight.grad
    if parts.head is not None:
        found["head.weight"] = parts.head.weight.grad
    return found


def both(rank, world, shapes):
    return [(by_torch(rank, world, shape), by_us(rank, world, shape)) for shape in shapes]


@pytest.fixture(scope="module")
def outcomes():
    """By shape: gradients of all ranks by name, from torch's runtime and from ours."""
    ranks = run_ranks(2, both, SHAPES, timeout_s=200)
    return {
        shape: tuple({name: g for rank in ranks for name, g in rank[at][which].items()} for which in range(2))
        for at, shape in enumerate(SHAPES)
    }


def expected(shape):
    reference = Reference(BUILD)
    reference.loss(padded(shape[2], shape[3])).backward()
    return reference.gradients()


def furthest(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - gradient).abs().max()) for name, gradient in wanted.items())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_trains_our_order_like_one_process(outcomes, shape):
    assert furthest(outcomes[shape][0], expected(shape)) <= 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_our_runtime_trains_like_torch(outcomes, shape):
    theirs, ours = outcomes[shape]
    assert furthest(ours, theirs) <= 1e-10


def test_refuses_to_share_attention_between_chunks_of_different_depth():
    """Six layers on four stages: two in each chunk 0, one in each chunk 1."""
    with pytest.raises(ScheduleError, match=r"hold . and . layers and share attention\. Give a number of layers that"):
        run_ranks(2, by_us, (2, 2, 2, 4), Tiny(layers=6), timeout_s=200)
