"""Everything that trains the model, each a step at a time; all ranks hold all contestants."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from benchmarks.pipeline.clocks import OpTimes
from benchmarks.pipeline.model import Decoder, Part, Size, cut, loss_of
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import build_parts, layer_ranges
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.graph import COMPUTE
from thresher.pipeline.schedule.ops import Kind, Op, Schedule

CPU = torch.device("cpu")
LAYERED = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD)


@dataclass(frozen=True)
class Entry:
    """Who runs, and how.

    Attributes:
        name: in tables.
        kind: "plain", "independent", "1f1b", "interleaved", "ours".
        chunks: stages per rank, v.
        bounds: of slices, for ours.
        slack: for ours.
        defer: torch's ``defer_pp_recv``.
    """

    name: str
    kind: str
    chunks: int = 1
    bounds: tuple[int, ...] = ()
    slack: int = 2
    defer: bool = False

    def schedule(self, stages: int, microbatches: int) -> Schedule:
        """Our lists of the same order of work."""
        if self.kind == "ours":
            return build_schedule(stages, self.chunks, microbatches, len(self.bounds) - 1, self.slack)
        return build_schedule(stages, self.chunks, microbatches, 1, policy=self.kind)


class Contestant(ABC):
    """One way to train the model.

    Attributes:
        times: of operations of the last step; to be emptied before a step.
    """

    times: OpTimes

    @abstractmethod
    def step(self, microbatches: list[Microbatch]) -> float | None:
        """Adds the gradients of all microbatches (of one slice each) to ``.grad``; this rank's share of the loss."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What this rank trains, by its name in the whole model."""

    @abstractmethod
    def takes_part(self) -> bool:
        """Whether this rank does anything."""

    def zero(self) -> None:
        """Forgets gradients and times."""
        self.times = OpTimes()
        for parameter in self.parameters().values():
            parameter.grad = None


class Whole(Contestant):
    """The whole model in one process: all microbatches in rank 0, or every rank for itself an equal share of them."""

    def __init__(self, size: Size, rank: int, world: int, shared: bool) -> None:
        self.part, self.times = Part(size, range(size.layers)), OpTimes()
        self.rank, self.world, self.shared = rank, world, shared

    def takes_part(self) -> bool:
        """Rank 0 alone, or all."""
        return self.shared or self.rank == 0

    def step(self, microbatches: list[Microbatch]) -> float | None:
        """See :class:`Contestant`."""
        if not self.takes_part():
            return None
        mine = microbatches[self.rank :: self.world] if self.shared else microbatches
        tokens = sum(m.layout.tokens for m in microbatches)
        total = 0.0
        for microbatch in mine:
            loss = loss_of(self.part(microbatch.inputs), microbatch.targets, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of the whole model."""
        return dict(self.part.named_parameters())


class _Stage(PipelineStage):
    """Torch's stage, with the CPU time of its operations.

    Attributes:
        held_peak: the most bytes of outputs for other stages that it kept.
    """

    times: OpTimes
    held_peak = 0

    def forward_one_chunk(self, *args: object, **kwargs: object) -> object:
        with self.times.of(Kind.FORWARD, self.stage_index):
            output = super().forward_one_chunk(*args, **kwargs)  # type: ignore[arg-type]
        outputs = [] if self.is_last else [tensor for kept, _ in self.fwd_cache.values() for tensor in kept]
        self.held_peak = max(self.held_peak, sum(tensor.nbytes for tensor in outputs))
        return output

    def backward_one_chunk(self, *args: object, **kwargs: object) -> None:
        with self.times.of(Kind.BACKWARD, self.stage_index):
            super().backward_one_chunk(*args, **kwargs)  # type: ignore[arg-type]


class Torchs(Contestant):
    """A schedule of torch.distributed.pipelining; shapes are given, so that no step infers them."""

    def __init__(self, size: Size, rank: int, world: int, microbatches: int, entry: Entry) -> None:
        self.times, self.tokens = OpTimes(), size.tokens * microbatches
        ranges = layer_ranges(size.layers, world * entry.chunks)
        self.stages = [
            _stage(size, ranges[rank + chunk * world], rank + chunk * world, len(ranges))
            for chunk in range(entry.chunks)
        ]
        self.is_first, self.is_last = self.stages[0].is_first, self.stages[-1].is_last
        self.schedule: Schedule1F1B | ScheduleInterleaved1F1B
        if entry.kind == "1f1b":
            self.schedule = Schedule1F1B(self.stages[0], microbatches, self._loss, scale_grads=False)
        else:
            self.schedule = ScheduleInterleaved1F1B(
                list(self.stages), microbatches, self._loss, scale_grads=False, defer_pp_recv=entry.defer
            )

    def takes_part(self) -> bool:
        """All ranks do."""
        return True

    @property
    def held_peak(self) -> int:
        """Bytes of outputs that its stages kept at their peaks."""
        return sum(stage.held_peak for stage in self.stages)

    def buffers(self) -> list[Tensor]:
        """What it receives into; after the first step."""
        slots = [
            slot for stage in self.stages for of in (stage.args_recv_info, stage.grad_recv_info) for slot in of.values()
        ]
        return [info.buffer for slot in slots for info in slot if info is not None and info.buffer is not None]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        with self.times.of(Kind.LOSS, 0):
            return loss_of(logits, targets, self.tokens)

    def step(self, microbatches: list[Microbatch]) -> float | None:
        """See :class:`Contestant`."""
        for stage in self.stages:
            stage.times = self.times
        inputs = [torch.cat([m.inputs for m in microbatches])] if self.is_first else []
        if not self.is_last:
            self.schedule.step(*inputs, return_outputs=False)
            return None
        losses: list[Tensor] = []
        targets = torch.cat([m.targets for m in microbatches])
        self.schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        return float(torch.stack(losses).detach().sum())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of this rank's stages."""
        return {name: p for stage in self.stages for name, p in stage.submod.named_parameters()}


def _stage(size: Size, layers: range, number: int, stages: int) -> _Stage:
    hidden = torch.empty(1, size.tokens, size.width, device="meta")
    ids = torch.empty(1, size.tokens, dtype=torch.int64, device="meta")
    logits = torch.empty(1, size.tokens, size.vocabulary, device="meta")
    given = ids if number == 0 else hidden.requires_grad_()
    made = (logits if number == stages - 1 else hidden).clone().detach().requires_grad_()
    return _Stage(Part(size, layers), number, stages, CPU, input_args=given, output_args=made)


class Ours(Contestant):
    """Our runtime. It is its own observer."""

    def __init__(self, size: Size, rank: int, world: int, microbatches: int, entry: Entry) -> None:
        self.times, self.rank, self.bounds = OpTimes(), rank, entry.bounds or even_bounds(size.tokens, 1)
        self.shown = entry.schedule(world, microbatches)
        self.parts = build_parts(Decoder(size), self.shown.shape, rank, CPU)
        timeout = timedelta(seconds=600)
        groups = make_groups(self.shown, [range(world)], timeout) if world > 1 else None
        self.runtime = PipelineRuntime(self.shown, self.parts, groups, RuntimeOptions(timeout), self)
        self._started = 0.0

    def takes_part(self) -> bool:
        """All ranks do."""
        return True

    def before(self, op: Op) -> None:
        """See :class:`~thresher.pipeline.runtime.runtime.Observer`."""
        self._started = time.thread_time()

    def after(self, op: Op) -> None:
        """Notes the CPU time of compute operations."""
        if op.kind in COMPUTE:
            stage = self.shown.shape.stage(self.rank, op.chunk) if op.kind in LAYERED else 0
            self.times.add(op.kind, stage, op.slice, time.thread_time() - self._started)

    def step(self, microbatches: list[Microbatch]) -> float | None:
        """See :class:`Contestant`."""
        loss = self.runtime.step(cut(microbatches, self.bounds)).loss
        return None if self.rank else float(loss)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of this rank's parts, without the number of the chunk."""
        return {_short(name): p for name, p in self.parts.named_parameters()}


def _short(name: str) -> str:
    """``layers.3.out.weight`` for ``stages.1.layers.3.out.weight``."""
    return name.split(".", 2)[2] if name.startswith("stages.") else name


def build(entry: Entry, size: Size, rank: int, world: int, microbatches: int) -> Contestant:
    """The contestant that ``entry`` names. Collective."""
    if entry.kind in ("plain", "independent"):
        return Whole(size, rank, world, shared=entry.kind == "independent")
    if entry.kind == "ours":
        return Ours(size, rank, world, microbatches, entry)
    return Torchs(size, rank, world, microbatches, entry)
