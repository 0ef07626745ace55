"""Executes a schedule: the face of a pipeline to those who train with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thresher.errors import ScheduleError
from thresher.pipeline.attention.regions import plan_regions
from thresher.pipeline.attention.store import KVStore, make_stores
from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.checks import checksums, digest, require_same_pipeline, require_usable
from thresher.pipeline.runtime.execution import Step
from thresher.pipeline.runtime.groups import Groups
from thresher.pipeline.runtime.ledger import Ledger
from thresher.pipeline.runtime.mail import Mail, Sizes
from thresher.pipeline.runtime.offload import Offloader, pinned_mover
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.runtime.transport import Transport
from thresher.pipeline.runtime.weights import WeightQueue, attach_queue
from thresher.pipeline.schedule.graph import TRANSFERS
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Schedule
from thresher.pipeline.schedule.validate import validate

FORWARD_KINDS = (Kind.EMBED, Kind.FORWARD, Kind.HEAD, Kind.LOSS)
FORWARD_PAYLOADS = (Payload.ROWS, Payload.ACTIVATION, Payload.HIDDEN, Payload.PARTIAL)


class Observer(Protocol):
    """Is told of every operation; for timelines, measurements and injected faults."""

    def before(self, op: Op) -> None:
        """``op`` is next."""

    def after(self, op: Op) -> None:
        """``op`` is over."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step yields.

    Attributes:
        loss: scalar, the same on every rank: sum of weight times loss over all tokens, over ``total_weight``.
        input_gradients: on rank 0, by microbatch, [B, S, D] where inputs are vectors; empty otherwise.
        hidden: on the last rank of an evaluation that wants them, by microbatch [B, S, D]; empty otherwise.
    """

    loss: Tensor
    input_gradients: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]


class PipelineRuntime:
    """Runs one rank's list of a schedule, step after step. Gradients are added to ``.grad`` of the parts' parameters.

    Args:
        parts: what this rank holds.
        groups: of its pipeline; None where the pipeline is this process alone.
        observer: told of every operation.

    Raises:
        ScheduleError: the schedule is not valid, or other ranks run another one, other parts or with other options.
    """

    def __init__(
        self,
        schedule: Schedule,
        parts: RankParts,
        groups: Groups | None = None,
        options: RuntimeOptions | None = None,
        observer: Observer | None = None,
    ) -> None:
        validate(schedule)
        self.schedule, self.parts, self.groups = schedule, parts, groups
        self.options, self.observer = options or RuntimeOptions(), observer
        self.rank = groups.rank if groups else 0
        self.device = next(parts.parameters()).device
        self.ledger = Ledger()
        self._transport = Transport(groups, self.options.timeout, self.ledger, self.device)
        self._queues = _queues(schedule, parts)
        self._ops = schedule.ranks[self.rank]
        self._forward_ops = [op for op in self._ops if _is_forward(op)]
        mover = pinned_mover(self.device, self.options.offload)
        self._offloader = (
            Offloader(mover, self._ops, self.options.offload, excluded=parts.parameters()) if mover else None
        )
        self._chunk_ends = _chunk_ends(self._ops)
        self._stores: tuple[tuple[Layout, ...], list[KVStore]] | None = None
        self._is_torn = False
        require_same_pipeline(schedule, parts, self.options, self._transport)

    def step(
        self,
        microbatches: Sequence[Microbatch],
        *,
        total_weight: float | None = None,
        step: int = 0,
        chunk_done: Callable[[int], None] | None = None,
    ) -> StepOutcome:
        """Forward and backward of ``microbatches``. Collective: every rank of the pipeline calls it with the same.

        Args:
            total_weight: by which the sum of weighted losses is divided; None for the weights of all ``microbatches``.
                Replicas of a pipeline hand in the weight of all of them.
            step: number of the step, for dropout and sampled negatives.
            chunk_done: called with a chunk when its gradients are complete.

        Raises:
            ScheduleError: the microbatches do not fit the schedule, other ranks were given other ones, or an earlier
                step ended with an error.
            PipelineStalled: a message did not come in time.
        """
        run = self._begin(microbatches, total_weight, step, training=True, keep_hidden=False)
        for index, op in enumerate(self._ops):
            self._run(run, op)
            if chunk_done is not None and index in self._chunk_ends:
                chunk_done(self._chunk_ends[index])
        return self._end(run)

    def evaluate(
        self,
        microbatches: Sequence[Microbatch],
        *,
        total_weight: float | None = None,
        step: int = 0,
        keep_hidden: bool = False,
    ) -> StepOutcome:
        """The loss alone: forward operations of the schedule, without dropout or gradients. Collective.

        Args:
            keep_hidden: whether the last rank wants the outputs of the trunk.

        Raises:
            ScheduleError, PipelineStalled: as :meth:`step`.
        """
        run = self._begin(microbatches, total_weight, step, training=False, keep_hidden=keep_hidden)
        with torch.no_grad():
            for op in self._forward_ops:
                self._run(run, op)
        return self._end(run)

    def _begin(
        self, given: Sequence[Microbatch], total_weight: float | None, number: int, training: bool, keep_hidden: bool
    ) -> Step:
        microbatches = tuple(given)
        self._require_whole()
        require_usable(self.schedule, microbatches, self.parts)
        layouts = tuple(microbatch.layout for microbatch in microbatches)
        weight = float(sum(m.weights.sum() for m in microbatches)) if total_weight is None else total_weight
        self._transport.now = "the beginning of a step"
        facts = digest(layouts, checksums(microbatches), weight, number, training)
        self._transport.require_same(facts, "layout, tokens, weight or number of the step")
        self.parts.train(training)
        self._is_torn = True
        return Step(
            shape=self.schedule.shape,
            rank=self.rank,
            parts=self.parts,
            microbatches=microbatches,
            stores=self._stores_for(layouts),
            queues=self._queues,
            mail=Mail(self._transport, self.rank, self._sizes(microbatches)),
            transport=self._transport,
            options=self.options,
            offloader=self._offloader,
            number=number,
            total_weight=weight or 1.0,
            training=training,
            keep_hidden=keep_hidden,
            loss=torch.zeros((), dtype=torch.promote_types(self.parts.dtype, torch.float32), device=self.device),
        )

    def _require_whole(self) -> None:
        """Refuses to go on after a step that ended early: slices and messages of it are still around."""
        if self._is_torn:
            raise ScheduleError(
                "an earlier step ended with an error",
                where="pipeline",
                fix="make a new runtime, with new groups, and load the last checkpoint",
            )

    def _run(self, run: Step, op: Op) -> None:
        if self.observer is not None:
            self.observer.before(op)
        run.run(op)
        self.ledger.set("accumulators", sum(store.accumulator_bytes for store in run.stores))
        if self.observer is not None:
            self.observer.after(op)

    def _end(self, run: Step) -> StepOutcome:
        run.mail.drain()
        assert run.is_over, "a step left something behind"
        for store in run.stores:
            store.require_empty()
        self._transport.now = "the end of a step"
        self._transport.share(run.loss, self.schedule.shape.stages - 1)
        self._is_torn = False
        gradients = tuple(run.input_gradients[number] for number in sorted(run.input_gradients))
        return StepOutcome(run.loss, gradients, _joined(run))

    def _stores_for(self, layouts: tuple[Layout, ...]) -> list[KVStore]:
        if self._stores is None or self._stores[0] != layouts:
            layers = [len(self.parts.stage(chunk).layers) for chunk in range(self.schedule.shape.chunks)]
            self._stores = (layouts, make_stores(plan_regions(self.schedule, self.rank, layouts, layers)))
        return self._stores[1]

    def _sizes(self, microbatches: tuple[Microbatch, ...]) -> Sizes:
        shape, head = self.schedule.shape, self.parts.head
        counts: dict[tuple[int, int], tuple[int, ...]] = {}
        if shape.split_embedding and self.parts.embedding is not None and not microbatches[0].are_vectors:
            cuts = [m.cut(m.inputs, index) for m in microbatches for index in range(shape.slices)]
            owned = torch.stack([self.parts.embedding.counts(ids) for ids in cuts]).tolist()  # one wait for the device
            counts = {divmod(place, shape.slices): tuple(each) for place, each in enumerate(owned)}
        statistics = head.statistics if head is not None and shape.split_head else 0
        return Sizes(microbatches, self.parts.dtype, self.parts.width, statistics, counts)


def _queues(schedule: Schedule, parts: RankParts) -> list[WeightQueue]:
    queues = [WeightQueue() for _ in range(schedule.shape.chunks)]
    for chunk, queue in enumerate(queues):
        attach_queue(parts.stage(chunk), queue)
    return queues


def _is_forward(op: Op) -> bool:
    if op.kind in TRANSFERS:
        return op.payload in FORWARD_PAYLOADS
    return op.kind in FORWARD_KINDS


def _chunk_ends(ops: Sequence[Op]) -> dict[int, int]:
    """By place in the list, the chunk whose last backward it is."""
    kinds = (Kind.BACKWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD)
    last = {op.chunk: index for index, op in enumerate(ops) if op.kind in kinds}
    return {index: chunk for chunk, index in last.items()}


def _joined(run: Step) -> tuple[Tensor, ...]:
    slices = range(run.shape.slices)
    numbers = sorted({number for number, _ in run.hidden})
    return tuple(torch.cat([run.hidden[number, index] for index in slices], dim=1) for number in numbers)
