"""How replicas of a pipeline add up their gradients.

Losses are divided by the weight of the whole step, of all replicas, so gradients of replicas are *summed*. They are
reduced once per step and chunk, when its last backward is over, while other chunks and ranks are still draining:

    replica 0    B(c1) .. B(c1) | B(c0) .. B(c0) |        finish
                     chunk_done(1)^    chunk_done(0)^     embedding and output layer; wait for all
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thresher.errors import PipelineStalled
from thresher.pipeline.parallel.mesh import PipelineMesh
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.vocabulary.arithmetic import gradient_of

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""An optimizer of the parameters given."""


class Stepping(Protocol):
    """What a training loop needs of an optimizer.

    Attributes:
        param_groups: options by group of parameters; a new ``lr`` holds from the next step on.
    """

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> object:
        """Updates parameters from gradients."""

    def zero_grad(self) -> None:
        """Forgets gradients."""


@dataclass(frozen=True)
class Gradients:
    """What this process holds of the reduced gradients, each number once per pipeline.

    Attributes:
        whole: the same on all replicas.
        sharded: cut over the replicas, each holds its own part; padding is 0.
    """

    whole: list[Tensor] = field(default_factory=list)
    sharded: list[Tensor] = field(default_factory=list)


class DenseState(ABC):
    """One way to hold parameters, gradients and optimizer state of ``parts`` on the replicas of ``mesh``.

    Replica 0's parameters and buffers are copied to the others. Collective over the replicas, as are all methods but
    :meth:`gradients`; every replica runs the same schedule, hence in the same order.
    """

    def __init__(self, parts: RankParts, mesh: PipelineMesh) -> None:
        self.parts, self.mesh = parts, mesh
        self._done: set[int] = set()
        for tensor in [*parts.parameters(), *parts.buffers()]:
            dist.broadcast(tensor.detach(), group=mesh.data, group_src=0)

    @abstractmethod
    def optimizer(self, make: MakeOptimizer) -> Stepping:
        """The optimizer of all parameters of this process; made once, before the first step."""

    @abstractmethod
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Optimizer state of each parameter that has some, in the shape it has here."""

    @abstractmethod
    def make_state(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gives optimizer state to exactly ``parameters``; weights do not change."""

    @abstractmethod
    def take_state(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Goes on from ``state``, which :meth:`state` gave and which was changed in place."""

    @abstractmethod
    def weights_changed(self) -> None:
        """To be called after weights were changed from outside."""

    @abstractmethod
    def gradients(self) -> Gradients:
        """Of this step, after :meth:`finish`; changing them in place changes what the optimizer sees."""

    @abstractmethod
    def _reduce(self, chunk: int) -> None:
        """Starts the reduction of one chunk's gradients."""

    @abstractmethod
    def _finish(self) -> None:
        """Reduces the gradients of embedding and output layer, and waits for all."""

    def chunk_done(self, chunk: int) -> None:
        """Starts to reduce the gradients of ``chunk``, which are complete. For ``PipelineRuntime.step``."""
        assert chunk not in self._done, f"chunk {chunk} was reduced already"
        self._done.add(chunk)
        self._reduce(chunk)

    def finish(self) -> None:
        """Reduces what is left, and waits. After every step, before gradients are looked at."""
        for chunk in range(len(self.parts.stages)):
            if chunk not in self._done:
                self._reduce(chunk)
        self._finish()
        self._done.clear()


class TorchState(DenseState):
    """With one of torch's optimizers over the parameters as they are."""

    _optimizer: torch.optim.Optimizer | None = None

    def optimizer(self, make: MakeOptimizer) -> Stepping:
        """See :class:`DenseState`."""
        assert self._optimizer is None, "there is an optimizer already"
        self._optimizer = make(trained(self.parts))
        return self._optimizer

    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """See :class:`DenseState`; shares memory with the optimizer."""
        return {p: values for p, values in self._made.state.items() if isinstance(p, nn.Parameter)}

    def make_state(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :class:`DenseState`."""
        restart(self._made, parameters)

    def take_state(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """See :class:`DenseState`; it is the optimizer's own."""

    def weights_changed(self) -> None:
        """See :class:`DenseState`; nothing else depends on them."""

    @property
    def _made(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None, "there is no optimizer yet"
        return self._optimizer


class Replicated(TorchState):
    """Every replica holds everything; gradients are all-reduced in buckets, in the background.

    torch's DistributedDataParallel would start them from hooks in autograd, which neither the output layer nor weight
    gradients put off run through. A parameter without a gradient counts as one with gradient 0.

    Args:
        bucket_bytes: about how much is reduced at a time.
    """

    def __init__(self, parts: RankParts, mesh: PipelineMesh, bucket_bytes: int = 25 << 20) -> None:
        super().__init__(parts, mesh)
        self._sums = BucketedSum(mesh.data, bucket_bytes)

    def gradients(self) -> Gradients:
        """See :class:`DenseState`."""
        return Gradients(whole=[gradient_of(parameter) for parameter in trained(self.parts)])

    def _reduce(self, chunk: int) -> None:
        self._sums.start(trained(self.parts.stage(chunk)))

    def _finish(self) -> None:
        self._sums.start(vocabulary_parameters(self.parts))
        self._sums.wait()


class BucketedSum:
    """Sums gradients over ``group`` in the background.

    Args:
        bucket_bytes: gradients are joined into buffers of about this size; a larger one travels alone.
    """

    def __init__(self, group: dist.ProcessGroup, bucket_bytes: int) -> None:
        self._group, self._bucket_bytes = group, bucket_bytes
        self._pending: list[tuple[dist.Work, Tensor, list[Tensor]]] = []

    def start(self, parameters: Sequence[nn.Parameter]) -> None:
        """Starts with the gradients of ``parameters``, which must not change until :meth:`wait`."""
        if self._group.size() == 1:
            return
        for gradients in self._buckets([gradient_of(parameter) for parameter in parameters]):
            joined = torch.cat([gradient.flatten() for gradient in gradients])
            work = dist.all_reduce(joined, group=self._group, async_op=True)
            assert work is not None
            self._pending.append((work, joined, gradients))

    def wait(self) -> None:
        """Waits for all that was started; gradients are sums then.

        Raises:
            PipelineStalled: a replica did not come in time, or is gone.
        """
        for work, joined, gradients in self._pending:
            try:
                work.wait()
            except RuntimeError as error:
                raise PipelineStalled(
                    f"replicas did not sum {joined.nbytes:,} bytes of gradients: {error}",
                    where=f"rank {dist.get_rank()}, among ranks {dist.get_process_group_ranks(self._group)}",
                    fix="look at what the other replicas report first",
                ) from error
            for gradient, total in zip(gradients, torch.split(joined, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))
        self._pending.clear()

    def _buckets(self, gradients: list[Tensor]) -> Iterator[list[Tensor]]:
        """Of one dtype each, in order."""
        for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
            bucket: list[Tensor] = []
            for gradient in (g for g in gradients if g.dtype == dtype):
                if bucket and sum(g.nbytes for g in bucket) + gradient.nbytes > self._bucket_bytes:
                    yield bucket
                    bucket = []
                bucket.append(gradient)
            yield bucket


def restart(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Leaves ``optimizer`` with state of exactly ``parameters``; gradients are forgotten.

    What is missing is made by a step at rate 0. (Adagrad makes state at the beginning, and only then.)
    """
    optimizer.zero_grad()
    wanted = set(parameters)
    for parameter in [known for known in optimizer.state if known not in wanted]:
        del optimizer.state[parameter]
    for parameter in wanted.difference(optimizer.state):
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of ``module`` that are trained, each once."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def vocabulary_parameters(parts: RankParts) -> list[nn.Parameter]:
    """Trained parameters of the embedding and the output layer; one that they share is one."""
    stages = {parameter for stage in parts.stages for parameter in stage.parameters()}
    return [parameter for parameter in trained(parts) if parameter not in stages]
