"""Optimizer state sharded over the replicas: DeepSpeed's ZeRO stage 1 under a pipeline."""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thresher.errors import ConfigError
from thresher.pipeline.parallel.dense import (
    DenseState,
    Gradients,
    MakeOptimizer,
    Stepping,
    trained,
    vocabulary_parameters,
)
from thresher.pipeline.parallel.mesh import PipelineMesh
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.vocabulary.arithmetic import gradient_of


class ZeroStage1(DenseState):
    """Parameters whole on every replica; each updates 1/d of the fp32 master weights, which then are gathered.

    DeepSpeed's engine wants to own forward and backward. Its optimizer does not: it takes gradients where a pipeline
    left them (``reduce_gradients(pipeline_parallel=True)``, as its PipelineEngine calls it). There is one per chunk,
    so that a chunk is reduced when it is done, and one for embedding and output layer. Reductions are not in the
    background on gloo. A parameter without a gradient counts as one with gradient 0.

    Raises:
        ConfigError: DeepSpeed is not installed, or parameters are neither float32, bfloat16 nor float16: its master
            weights are float32, so float64 would be rounded.
    """

    def __init__(self, parts: RankParts, mesh: PipelineMesh) -> None:
        super().__init__(parts, mesh)
        narrow = (torch.float32, torch.bfloat16, torch.float16)
        for name, parameter in parts.named_parameters():
            if parameter.dtype not in narrow:
                raise ConfigError(
                    f"DeepSpeed's master weights are float32, '{name}' is {parameter.dtype}",
                    where="pipeline.dense",
                    fix="train in float32, or replicate or shard the layers instead",
                )
        self._parameters = [trained(parts.stage(chunk)) for chunk in range(len(parts.stages))]
        self._parameters.append(vocabulary_parameters(parts))
        self._optimizers: list[_Optimizer | None] = []

    def optimizer(self, make: MakeOptimizer) -> Stepping:
        """See :class:`DenseState`. Of ``make``'s optimizer, groups of parameters and their options are kept."""
        assert not self._optimizers, "there is an optimizer already"
        self._optimizers = [_Optimizer(make, own, self.mesh) if own else None for own in self._parameters]
        return _Together([optimizer for optimizer in self._optimizers if optimizer is not None])

    def gradients(self) -> Gradients:
        """See :class:`DenseState`."""
        return Gradients(sharded=[g for o in self._optimizers if o is not None for g in o.gradients()])

    def _reduce(self, chunk: int) -> None:
        optimizer = self._optimizers[chunk]
        if optimizer is not None:
            optimizer.reduce()

    def _finish(self) -> None:
        self._reduce(len(self.parts.stages))


class _Together:
    """Several optimizers as one."""

    def __init__(self, optimizers: Sequence["_Optimizer"]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        """Updates all parameters, and gathers them."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forgets gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class _Optimizer:
    """DeepSpeed's optimizer of some parameters."""

    def __init__(self, make: MakeOptimizer, parameters: list[nn.Parameter], mesh: PipelineMesh) -> None:
        zero, timer = _deepspeed()
        self._parameters = parameters
        dtype = parameters[0].dtype
        self._inner = zero.DeepSpeedZeroOptimizer(
            make(parameters),
            {parameter: str(number) for number, parameter in enumerate(parameters)},
            timers=timer.NoopTimer(),
            optimizer_params={},
            dp_process_group=mesh.data,
            partition_grads=False,
            reduce_scatter=False,
            contiguous_gradients=False,
            overlap_comm=False,
            gradient_average=False,
            communication_data_type=dtype,
            gradient_accumulation_dtype=dtype,
            check_grad_overflow=False,
            compute_grad_norm=False,
        )

    def reduce(self) -> None:
        """Sums gradients over the replicas; this replica keeps its part of them."""
        for parameter in self._parameters:
            gradient_of(parameter)
        self._inner.reduce_gradients(pipeline_parallel=True)

    def gradients(self) -> list[Tensor]:
        """This replica's part."""
        return [gradient for group in self._inner.averaged_gradients.values() for gradient in group]

    def step(self) -> None:
        """Updates this replica's part, and gathers all."""
        self._inner.step()

    def zero_grad(self) -> None:
        """Forgets gradients."""
        self._inner.zero_grad()


def _deepspeed() -> tuple[ModuleType, ModuleType]:
    """Modules of its optimizer and its timers."""
    try:
        comm = importlib.import_module("deepspeed.comm")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported: {error}", where="pipeline.dense", fix="install it, or choose another way"
        ) from None
    comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    zero = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    return zero, importlib.import_module("deepspeed.utils.timer")
