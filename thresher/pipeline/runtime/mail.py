"""What operations of a step hand to each other, on the same rank or from rank to rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.groups import channel
from thresher.pipeline.runtime.transport import Spec, Transfer, Transport
from thresher.pipeline.schedule.ops import Op, Payload


@dataclass(frozen=True, slots=True)
class Key:
    """One payload of one slice. ``chunk`` is the sender's, ``source`` the rank that made it."""

    payload: Payload
    microbatch: int
    chunk: int
    slice: int
    source: int
    target: int


@dataclass(frozen=True)
class Sizes:
    """What is needed to know the shape of a message before it comes.

    Attributes:
        dtype: of hidden states between stages.
        width: D.
        statistics: numbers per token of a head; 0 where the output layer is not cut.
        counts: tokens of each (microbatch, slice) whose embedding row each rank owns; empty where it is not cut.
    """

    microbatches: tuple[Microbatch, ...]
    dtype: torch.dtype
    width: int
    statistics: int
    counts: dict[tuple[int, int], tuple[int, ...]]

    def specs(self, key: Key) -> list[Spec]:
        """Shapes and dtypes of the tensors that ``key`` consists of."""
        layout = self.microbatches[key.microbatch].layout
        tokens = (layout.batch, layout.length(key.slice))
        hidden: Spec = ((*tokens, self.width), self.dtype)
        exact = torch.promote_types(self.dtype, torch.float32)
        if key.payload is Payload.PARTIAL:
            return [((*tokens, self.width), exact), ((*tokens, self.statistics), exact)]
        if key.payload is Payload.NORMALISER:
            return [(tokens, exact)]
        if key.payload in (Payload.ROWS, Payload.ROW_GRADIENT):
            owner = key.source if key.payload is Payload.ROWS else key.target
            return [((self.counts[key.microbatch, key.slice][owner], self.width), self.dtype)]
        return [hidden]


class Mail:
    """Tensors waiting for the operation that consumes them, and messages under way."""

    def __init__(self, transport: Transport, rank: int, sizes: Sizes) -> None:
        self._transport, self._rank, self._sizes = transport, rank, sizes
        self._here: dict[Key, list[Tensor]] = {}
        self._coming: dict[Key, Transfer] = {}
        self._going: dict[Key, Transfer] = {}

    def put(self, key: Key, *tensors: Tensor) -> None:
        """Leaves ``tensors`` for the operation that consumes or sends them."""
        self._here[key] = list(tensors)

    def take(self, key: Key) -> list[Tensor]:
        """The tensors of ``key``, once they are there. They are given away."""
        if key in self._here:
            return self._here.pop(key)
        return self._coming.pop(key).wait()

    def send(self, op: Op) -> None:
        """Starts to send what was put for ``op``."""
        key = self._key(op, self._rank, op.peer)
        specs = self._sizes.specs(key)
        tensors = self._here.pop(key)
        for tensor, (shape, dtype) in zip(tensors, specs, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), (str(op), tensor.shape, tensor.dtype, specs)
        name = channel(key.payload, key.source, key.target)
        self._going[key] = self._transport.send(name, op.peer, tensors, _told(op))

    def receive(self, op: Op) -> None:
        """Allocates buffers for ``op`` and starts to receive."""
        key = self._key(op, op.peer, self._rank)
        name = channel(key.payload, key.source, key.target)
        specs = self._sizes.specs(key)
        self._coming[key] = self._transport.receive(name, op.peer, specs, _told(op))

    def release(self, op: Op) -> None:
        """Waits until what ``op`` names has been taken, and frees it."""
        self._going.pop(self._key(op, self._rank, op.peer)).wait()

    def drain(self) -> None:
        """Waits for everything that is still being sent, at the end of a step."""
        for key in list(self._going):
            self._going.pop(key).wait()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits or is under way."""
        return not (self._here or self._coming or self._going)

    def _key(self, op: Op, source: int, target: int) -> Key:
        assert op.payload is not None
        return Key(op.payload, op.microbatch, op.chunk, op.slice, source, target)


def _told(op: Op) -> str:
    assert op.payload is not None
    return f"the {op.payload.name.lower()} of microbatch {op.microbatch}, chunk {op.chunk}, slice {op.slice}"
