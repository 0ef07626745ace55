"""Optimizer state sharded over the replicas: DeepSpeed's ZeRO stage 1 under a pipeline."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from subprocess import SubprocessError
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thresher.errors import ConfigError
from thresher.pipeline.parallel.dense import (
    DenseState,
    Gradients,
    MakeOptimizer,
    Stepping,
    restart,
    trained,
    vocabulary_parameters,
)
from thresher.pipeline.parallel.mesh import PipelineMesh
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.vocabulary.arithmetic import gradient_of


class ZeroStage1(DenseState):
    """Parameters whole on every replica; each updates 1/d of them, which then are gathered.

    DeepSpeed's engine wants to own forward and backward. Its optimizer does not: it takes gradients where a pipeline
    left them (``reduce_gradients(pipeline_parallel=True)``, as its PipelineEngine calls it). There is one per chunk,
    so that a chunk is reduced when it is done, and one for embedding and output layer. On gloo the reduction does not
    run in the background. A parameter without a gradient counts as one with gradient 0.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot build its native part; or parameters are not float32, which
            its master weights are: float64 would be rounded, and of halves a checkpoint would miss the master weights.
    """

    def __init__(self, parts: RankParts, mesh: PipelineMesh) -> None:
        for name, parameter in parts.named_parameters():
            if parameter.dtype != torch.float32:
                raise ConfigError(
                    f"DeepSpeed's master weights are float32, '{name}' is {parameter.dtype}",
                    where="pipeline.dense",
                    fix="keep parameters in float32 (with autocast for narrower products), or choose another way",
                )
        self._modules = _deepspeed()
        super().__init__(parts, mesh)
        self._parameters = [trained(parts.stage(chunk)) for chunk in range(len(parts.stages))]
        self._parameters.append(vocabulary_parameters(parts))
        self._optimizers: list[_Optimizer | None] = []

    def optimizer(self, make: MakeOptimizer) -> Stepping:
        """See :class:`DenseState`."""
        assert not self._optimizers, "there is an optimizer already"
        self._optimizers = [
            _Optimizer(make, own, self.mesh, *self._modules) if own else None for own in self._parameters
        ]
        return _Together([optimizer for optimizer in self._optimizers if optimizer is not None])

    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """See :class:`DenseState`. Gathers the state of all replicas: for as long as it is held, it is whole."""
        return {parameter: values for one in self._all() for parameter, values in one.state().items()}

    def make_state(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :class:`DenseState`. All parameters of a chunk have state, or none has."""
        for one in self._all():
            one.make_state(set(parameters))

    def take_state(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """See :class:`DenseState`."""
        for one in self._all():
            one.take_state(state)

    def weights_changed(self) -> None:
        """See :class:`DenseState`."""
        for one in self._all():
            one.weights_changed()

    def gradients(self) -> Gradients:
        """See :class:`DenseState`."""
        return Gradients(sharded=[gradient for one in self._all() for gradient in one.gradients()])

    def _reduce(self, chunk: int) -> None:
        optimizer = self._optimizers[chunk]
        if optimizer is not None:
            optimizer.reduce()

    def _finish(self) -> None:
        self._reduce(len(self.parts.stages))

    def _all(self) -> Iterator["_Optimizer"]:
        return (one for one in self._optimizers if one is not None)


class _Together:
    """Several optimizers as one."""

    def __init__(self, optimizers: Sequence["_Optimizer"]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all."""
        return [group for optimizer in self.optimizers for group in optimizer.inner.param_groups]

    def step(self) -> None:
        """Updates all parameters, and gathers them."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forgets gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class _Optimizer:
    """DeepSpeed's optimizer of some parameters: joined to one vector, of which this replica updates a piece."""

    def __init__(
        self,
        make: MakeOptimizer,
        parameters: list[nn.Parameter],
        mesh: PipelineMesh,
        zero: ModuleType,
        timer: ModuleType,
    ) -> None:
        self._parameters, self._mesh = parameters, mesh
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
            communication_data_type=torch.float32,
            gradient_accumulation_dtype=torch.float32,
            check_grad_overflow=False,
            compute_grad_norm=False,
        )

    @property
    def piece(self) -> nn.Parameter:
        """This replica's piece of the joined parameters."""
        (piece,) = self._inner.single_partition_of_fp32_groups
        assert isinstance(piece, Tensor)
        return piece  # type: ignore[return-value]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer of the piece."""
        optimizer: torch.optim.Optimizer = self._inner.optimizer
        return optimizer

    def reduce(self) -> None:
        """Sums gradients over the replicas; this replica keeps its piece of them."""
        for parameter in self._parameters:
            gradient_of(parameter)
        self._inner.reduce_gradients(pipeline_parallel=True)

    def gradients(self) -> list[Tensor]:
        """Of the piece."""
        return [gradient for group in self._inner.averaged_gradients.values() for gradient in group]

    def step(self) -> None:
        """Updates the piece, and gathers all."""
        self._inner.step()

    def zero_grad(self) -> None:
        """Forgets gradients."""
        self._inner.zero_grad()

    def weights_changed(self) -> None:
        """The piece becomes what the parameters are."""
        self._inner.refresh_fp32_params()

    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Of each parameter, whole."""
        found: dict[nn.Parameter, dict[str, Any]] = {}
        for key, value in self.inner.state.get(self.piece, {}).items():
            whole = self._gathered(value) if self._is_cut(value) else None
            for parameter, first in self._places():
                cut = None if whole is None else whole[first : first + parameter.numel()].view_as(parameter)
                found.setdefault(parameter, {})[key] = value.clone() if cut is None else cut
        return found

    def make_state(self, parameters: set[nn.Parameter]) -> None:
        """Gives the piece state, or none."""
        restart(self.inner, [self.piece] if parameters.intersection(self._parameters) else [])

    def take_state(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Cuts the piece's state out of that of the parameters."""
        for key, value in self.inner.state.get(self.piece, {}).items():
            if not self._is_cut(value):
                value.copy_(state[self._parameters[0]][key])
                continue
            whole = value.new_zeros(value.numel() * self._mesh.replicas)
            for parameter, first in self._places():
                whole[first : first + parameter.numel()] = state[parameter][key].flatten()
            value.copy_(whole.view(self._mesh.replicas, -1)[self._mesh.replica])

    def _is_cut(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == self.piece.shape

    def _gathered(self, value: Tensor) -> Tensor:
        whole = value.new_empty(value.numel() * self._mesh.replicas)
        dist.all_gather_single(whole, value, group=self._mesh.data)
        return whole

    def _places(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Where each parameter begins in the joined ones."""
        return zip(self._inner.round_robin_bit16_groups[0], self._inner.round_robin_bit16_offsets[0], strict=True)


def _deepspeed() -> tuple[ModuleType, ModuleType]:
    """Modules of its optimizer and its timers."""
    try:
        comm = importlib.import_module("deepspeed.comm")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported: {error}", where="pipeline.dense", fix="install it, or choose another way"
        ) from None
    try:
        comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    except (OSError, RuntimeError, SubprocessError) as error:
        raise ConfigError(
            f"DeepSpeed cannot build or load its native part: {error}",
            where="pipeline.dense",
            fix="install a C++ compiler and ninja, or choose another way",
        ) from error
    zero = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    return zero, importlib.import_module("deepspeed.utils.timer")
