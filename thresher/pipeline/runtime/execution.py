"""One step of one rank: every operation of its list, carried out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from thresher.pipeline.attention.sliced import SlicedContext
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.mail import Key, Mail
from thresher.pipeline.runtime.offload import Offloader
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.runtime.transport import ExchangePort, Transport
from thresher.pipeline.runtime.weights import WeightQueue
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Shape
from thresher.pipeline.vocabulary.head import Partial, SliceTargets


@dataclass
class LiveSlice:
    """What a slice leaves behind in a stage between its forward and its backward.

    Attributes:
        edge: the end of the stage's graph; the output itself is gone.
        caught: where the gradient of the stage's input appears.
    """

    edge: GradientEdge
    caught: list[Tensor]
    context: SlicedContext


class _Entry(torch.autograd.Function):
    """Where a stage begins: catches the gradient of its input, which is then no leaf.

    Hooks that move saved tensors to the host leave leaves where they are.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor, caught: list[Tensor]) -> Tensor:
        ctx.caught = caught
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.caught.append(gradients[0])
        return None, None, None


def _enter(values: Tensor, caught: list[Tensor]) -> Tensor:
    """``values`` [B, T, D], whose gradient will be in ``caught``. Needs something that wants a gradient: the anchor."""
    anchor = torch.empty(0, device=values.device, requires_grad=True)
    entered: Tensor = _Entry.apply(values, anchor, caught)  # type: ignore[no-untyped-call]
    return entered


@dataclass
class Step:
    """The state of one step on one rank.

    Attributes:
        loss: what LOSS operations of this rank added up; fp32 scalar, fp64 for fp64 models.
        input_gradients: by microbatch, [B, S, D] where inputs are vectors, on rank 0.
        hidden: by microbatch, outputs of the last stage by slice where they are wanted.
    """

    shape: Shape
    rank: int
    parts: RankParts
    microbatches: tuple[Microbatch, ...]
    stores: Sequence[KVStore]
    queues: Sequence[WeightQueue]
    mail: Mail
    transport: Transport
    options: RuntimeOptions
    offloader: Offloader | None
    number: int
    total_weight: float
    training: bool
    keep_hidden: bool
    loss: Tensor
    input_gradients: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _live: dict[tuple[int, int, int], LiveSlice] = field(default_factory=dict)
    _kept: dict[tuple[int, int], object] = field(default_factory=dict)
    _gradients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _port: ExchangePort | None = None

    def run(self, op: Op) -> None:
        """Carries out ``op``."""
        self.transport.now = str(op)
        _HANDLERS[op.kind](self, op)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left over."""
        return self.mail.is_empty and not (self._live or self._kept or self._gradients)

    def forward(self, op: Op) -> None:
        """One slice through one stage."""
        microbatch = self.microbatches[op.microbatch]
        values = self._input(op).detach()
        context = SlicedContext(
            self.stores[op.chunk],
            microbatch,
            op.microbatch,
            op.slice,
            seed=self.options.seed,
            step=self.number,
            training=self.training,
        )
        caught: list[Tensor] = []
        with self._ported(context), torch.set_grad_enabled(self.training), self._autocast(), self._leaving(op):
            if self.training:
                values = _enter(values, caught)
            output = self.parts.stage(op.chunk)(values, context, self.options.recompute).to(self.parts.dtype)
        if self.training:
            self._live[op.microbatch, op.chunk, op.slice] = LiveSlice(get_gradient_edge(output), caught, context)
        elif op.slice == microbatch.layout.slices - 1:
            self.stores[op.chunk].forget(op.microbatch)
        self._hand_on(op, output.detach())

    def backward(self, op: Op) -> None:
        """The same slice back; of an INPUT_BACKWARD, gradients of weight matrices wait for their WEIGHT_BACKWARD."""
        live = self._live.pop((op.microbatch, op.chunk, op.slice))
        if self.offloader is not None:
            self.offloader.before_backward(op)
        gradient = self._output_gradient(op)
        later = nullcontext() if op.kind is Kind.BACKWARD else self.queues[op.chunk].collect((op.microbatch, op.slice))
        live.context.again()
        with self._ported(live.context), later:
            torch.autograd.backward([live.edge], [gradient])
        self.stores[op.chunk].release(op.microbatch, op.slice)
        (caught,) = live.caught
        self._hand_back(op, caught)

    def weight_backward(self, op: Op) -> None:
        """Gradients of the weight matrices of one slice."""
        self.queues[op.chunk].run((op.microbatch, op.slice))

    def embed(self, op: Op) -> None:
        """This rank's rows of one slice's ids."""
        assert self.parts.embedding is not None
        rows = self.parts.embedding.rows(self._ids(op))
        self.mail.put(self._key(Payload.ROWS, op, 0, self.rank, 0), rows)

    def embed_backward(self, op: Op) -> None:
        """Adds the gradients of this rank's rows of one slice's ids."""
        assert self.parts.embedding is not None
        (gradient,) = self.mail.take(self._key(Payload.ROW_GRADIENT, op, 0, 0, self.rank))
        self.parts.embedding.add_gradient(self._ids(op), gradient)

    def head(self, op: Op) -> None:
        """This rank's rows of the output layer for one slice."""
        assert self.parts.head is not None
        (hidden,) = self.mail.take(self._key(Payload.HIDDEN, op, self.last_chunk, self.last_rank, self.rank))
        partial, kept = self.parts.head.part(hidden, self._targets(op))
        if self.training:
            self._kept[op.microbatch, op.slice] = kept
        partial_key = self._key(Payload.PARTIAL, op, self.last_chunk, self.rank, self.last_rank)
        self.mail.put(partial_key, partial.gradient, partial.statistics)

    def merge(self, op: Op) -> None:
        """The loss of one slice, on the last rank."""
        head, targets = self.parts.head, self._targets(op)
        assert head is not None
        partials, kept = self._partials(op, targets)
        merged = head.merge(partials, targets)
        self.loss += merged.loss
        if not self.training:
            return
        self._gradients[op.microbatch, op.slice] = merged.gradient
        if not self.shape.split_head:
            head.weight_gradient(kept, merged.normaliser)
            return
        for rank in range(self.shape.stages):
            key = self._key(Payload.NORMALISER, op, self.last_chunk, self.rank, rank)
            self.mail.put(key, merged.normaliser)

    def head_weight(self, op: Op) -> None:
        """The gradient of this rank's rows of the output layer."""
        assert self.parts.head is not None
        (normaliser,) = self.mail.take(self._key(Payload.NORMALISER, op, self.last_chunk, self.last_rank, self.rank))
        self.parts.head.weight_gradient(self._kept.pop((op.microbatch, op.slice)), normaliser)

    def share(self, op: Op) -> None:
        """The next operation shares its attention with another rank."""
        assert op.partner is not None
        assert self._port is None
        number, _, index = op.partner
        self._port = ExchangePort(self.transport, op.peer, op.share, self.microbatches[number], index)

    @property
    def last_rank(self) -> int:
        """The rank that holds the last stage."""
        return self.shape.stages - 1

    @property
    def last_chunk(self) -> int:
        """The chunk of the last stage on its rank."""
        return self.shape.chunks - 1

    def _input(self, op: Op) -> Tensor:
        microbatch, stage = self.microbatches[op.microbatch], self.shape.stage(self.rank, op.chunk)
        if stage:
            return self.mail.take(self._between(Payload.ACTIVATION, op, stage - 1, stage))[0]
        if microbatch.are_vectors:
            return microbatch.cut(microbatch.inputs, op.slice)
        embedding = self.parts.embedding
        assert embedding is not None
        if not self.shape.split_embedding:
            return embedding.assemble(self._ids(op), [embedding.rows(self._ids(op))])
        keys = [self._key(Payload.ROWS, op, 0, rank, 0) for rank in range(self.shape.stages)]
        return embedding.assemble(self._ids(op), [self.mail.take(key)[0] for key in keys])

    def _hand_on(self, op: Op, output: Tensor) -> None:
        stage = self.shape.stage(self.rank, op.chunk)
        if stage < self.shape.last_stage:
            self.mail.put(self._between(Payload.ACTIVATION, op, stage, stage + 1), output)
            return
        if self.keep_hidden:
            self.hidden[op.microbatch, op.slice] = output
        for rank in range(self.shape.stages) if self.shape.split_head else (self.rank,):
            self.mail.put(self._key(Payload.HIDDEN, op, op.chunk, self.rank, rank), output)

    def _output_gradient(self, op: Op) -> Tensor:
        stage = self.shape.stage(self.rank, op.chunk)
        if stage == self.shape.last_stage:
            return self._gradients.pop((op.microbatch, op.slice))
        return self.mail.take(self._between(Payload.GRADIENT, op, stage + 1, stage))[0]

    def _hand_back(self, op: Op, gradient: Tensor) -> None:
        stage, microbatch = self.shape.stage(self.rank, op.chunk), self.microbatches[op.microbatch]
        if stage:
            self.mail.put(self._between(Payload.GRADIENT, op, stage, stage - 1), gradient)
        elif microbatch.are_vectors:
            whole = self.input_gradients.setdefault(op.microbatch, torch.empty_like(microbatch.inputs))
            microbatch.cut(whole, op.slice).copy_(gradient)
        else:
            self._embedding_gradient(op, gradient)

    def _embedding_gradient(self, op: Op, gradient: Tensor) -> None:
        embedding = self.parts.embedding
        assert embedding is not None
        parts = embedding.gradient_parts(self._ids(op), gradient)
        if not self.shape.split_embedding:
            embedding.add_gradient(self._ids(op), parts[0])
            return
        for rank, part in enumerate(parts):
            self.mail.put(self._key(Payload.ROW_GRADIENT, op, 0, 0, rank), part)

    def _partials(self, op: Op, targets: SliceTargets) -> tuple[list[Partial], object]:
        assert self.parts.head is not None
        if not self.shape.split_head:
            (hidden,) = self.mail.take(self._key(Payload.HIDDEN, op, self.last_chunk, self.rank, self.rank))
            partial, kept = self.parts.head.part(hidden, targets)
            return [partial], kept
        ranks = range(self.shape.stages)
        keys = [self._key(Payload.PARTIAL, op, self.last_chunk, rank, self.rank) for rank in ranks]
        return [Partial(*self.mail.take(key)) for key in keys], None

    def _ids(self, op: Op) -> Tensor:
        microbatch = self.microbatches[op.microbatch]
        return microbatch.cut(microbatch.inputs, op.slice)

    def _targets(self, op: Op) -> SliceTargets:
        microbatch = self.microbatches[op.microbatch]
        weights = microbatch.cut(microbatch.weights, op.slice) / self.total_weight
        key = (self.options.seed, self.number, op.microbatch, op.slice)
        return SliceTargets(microbatch.cut(microbatch.targets, op.slice), weights, key)

    def _key(self, payload: Payload, op: Op, chunk: int, source: int, target: int) -> Key:
        return Key(payload, op.microbatch, chunk, op.slice, source, target)

    def _between(self, payload: Payload, op: Op, source: int, target: int) -> Key:
        """Of what stage ``source`` sends to stage ``target``."""
        stages = self.shape.stages
        return self._key(payload, op, source // stages, source % stages, target % stages)

    @contextmanager
    def _ported(self, context: SlicedContext) -> Iterator[None]:
        port, self._port = self._port, None
        context.port = port
        yield
        context.port = None
        if port is not None:
            port.finish()

    def _leaving(self, op: Op) -> AbstractContextManager[None]:
        if self.offloader is None or not self.training:
            return nullcontext()
        return self.offloader.forward(op, self.stores[op.chunk])

    def _autocast(self) -> AbstractContextManager[object]:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(self.loss.device.type, self.options.autocast)


_HANDLERS: Mapping[Kind, Callable[[Step, Op], None]] = {
    Kind.FORWARD: Step.forward,
    Kind.BACKWARD: Step.backward,
    Kind.INPUT_BACKWARD: Step.backward,
    Kind.WEIGHT_BACKWARD: Step.weight_backward,
    Kind.EMBED: Step.embed,
    Kind.EMBED_BACKWARD: Step.embed_backward,
    Kind.HEAD: Step.head,
    Kind.LOSS: Step.merge,
    Kind.HEAD_WEIGHT: Step.head_weight,
    Kind.EXCHANGE_FORWARD: Step.share,
    Kind.EXCHANGE_BACKWARD: Step.share,
    Kind.SEND: lambda step, op: step.mail.send(op),
    Kind.RECEIVE: lambda step, op: step.mail.receive(op),
    Kind.RELEASE: lambda step, op: step.mail.release(op),
}
