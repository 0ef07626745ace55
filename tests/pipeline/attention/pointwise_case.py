"""One layer of pointwise attention, sliced and whole, for tests on any device."""

from dataclasses import dataclass, field
from queue import Queue

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.pipeline.attention.one_rank import one_rank_store
from thresher.pipeline.attention.port import Arriving, Port
from thresher.pipeline.attention.sliced import SlicedContext
from thresher.pipeline.attention.whole import WholeContext
from thresher.pipeline.context import RelativeBias
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.microbatch import Microbatch

HEADS, WIDTH, DISTANCES, SPANS = 3, 5, 7, 9


@dataclass
class Case:
    """A microbatch, its number in the step, queries, keys, values and tables.

    Attributes:
        biases: how many tables there are: by position first, then by time.
        device, dtype: of everything.
        bounds: of slices; even ones where there are none.
    """

    slices: int
    batch: int = 1
    starts: tuple[int, ...] = (0,)
    biases: int = 2
    number: int = 0
    tokens: int = 19
    seed: int = 0
    width: int = WIDTH
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    bounds: tuple[int, ...] = ()
    leaves: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        rows = (self.batch, self.tokens)
        bounds = self.bounds or even_bounds(self.tokens, self.slices)
        self.layout = Layout(bounds, self.batch, self.starts)
        times = torch.randint(0, 500, rows, generator=draw).cumsum(1).to(self.device)
        ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.microbatch = Microbatch(self.layout, ids, ids, ids.double(), times)
        shapes = [(self.batch, HEADS, self.tokens, self.width)] * 4
        tables = [(HEADS, DISTANCES), (HEADS, SPANS)][: self.biases]
        drawn = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in (*shapes, *tables)]
        self.dout, *leaves = (x.to(self.device, self.dtype) for x in drawn)
        self.leaves = [x.requires_grad_() for x in leaves]

    @property
    def bias(self) -> RelativeBias | None:
        tables = self.leaves[3:]
        return RelativeBias(tables[0], tables[1] if len(tables) > 1 else None) if tables else None

    def cut(self, values: Tensor, index: int) -> Tensor:
        return values[:, :, self.layout.bounds[index] : self.layout.bounds[index + 1]]

    def whole(self) -> list[Tensor]:
        """Output, then gradients of the leaves."""
        context = WholeContext(self.microbatch, self.number, seed=0, step=0, training=True)
        out = context.attend_pointwise(0, *self.leaves[:3], self.bias)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)]

    def sliced(self, ports: "dict[tuple[str, int], Port] | None" = None, again: bool = False) -> list[Tensor]:
        """The same slice by slice; ``ports`` by direction ("F" or "B") and slice; ``again``: with recomputation."""
        store, ports = one_rank_store([self.layout] * (self.number + 1)), ports or {}
        contexts = [
            SlicedContext(store, self.microbatch, self.number, index, seed=0, step=0, training=True)
            for index in range(self.slices)
        ]
        for leaf in self.leaves:
            leaf.grad = None
        outs = []
        for index, context in enumerate(contexts):
            context.port = ports.get(("F", index))
            inputs = (0, *(self.cut(leaf, index) for leaf in self.leaves[:3]), self.bias)
            attend = context.attend_pointwise
            outs.append(checkpoint(attend, *inputs, use_reentrant=False) if again else attend(*inputs))
        for index in reversed(range(self.slices)):
            contexts[index].port = ports.get(("B", index))
            contexts[index].again()
            outs[index].backward(self.cut(self.dout, index))
            store.release(self.number, index)
        store.require_empty()
        return [torch.cat([out.detach() for out in outs], 2), *(leaf.grad for leaf in self.leaves)]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


class Line(Port):
    """A port between two threads."""

    def __init__(self, share: int, partner: Microbatch, partner_slice: int, out: Queue, into: Queue) -> None:
        self.share, self.partner, self.partner_slice = share, partner, partner_slice
        self._out, self._in, self.sent = out, into, 0

    def send(self, tensors) -> None:
        self.sent += len(tensors)
        for tensor in tensors:
            assert tensor.is_contiguous()
            self._out.put(tensor.clone())

    def receive(self, shapes) -> Arriving:
        return Coming(self._in, shapes)


class Coming(Arriving):
    def __init__(self, queue: Queue, shapes) -> None:
        self._queue, self._shapes = queue, shapes

    def wait(self) -> list[Tensor]:
        tensors = [self._queue.get(timeout=20) for _ in self._shapes]
        assert [(tuple(x.shape), x.dtype) for x in tensors] == [(tuple(s), d) for s, d in self._shapes]
        return tensors


def lines(giver: Case, giver_slice: int, helper: Case, helper_slice: int, share: int) -> tuple[Line, Line]:
    """Both ends of one exchange."""
    there, back = Queue(), Queue()
    return (
        Line(share, helper.microbatch, helper_slice, there, back),
        Line(-share, giver.microbatch, giver_slice, back, there),
    )
