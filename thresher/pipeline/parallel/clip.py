"""The norm of all gradients of a model that is spread over stages and replicas, and scaling by it."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.pipeline.parallel.dense import Gradients
from thresher.pipeline.parallel.mesh import PipelineMesh

_EPSILON = 1e-6
"""As torch.nn.utils.clip_grad_norm_ has it, so that a pipeline clips as one process does."""


def clip_gradients(gradients: Gradients, mesh: PipelineMesh, max_norm: float = math.inf) -> float:
    """The Euclidean norm of the gradient of the whole model; gradients are scaled down to ``max_norm`` in place.

    Collective over the mesh; the same number on every process. Every parameter counts once: those whole on all
    replicas by one of them, tied ones by the rank that holds them, parts of tables by their owners.

    Args:
        gradients: of this process, see :meth:`DenseState.gradients`.
        max_norm: inf to measure only.

    Returns:
        The norm before scaling; inf or nan if a gradient is not finite, which are left as they are then.
    """
    squares = torch.stack([_squares(gradients.whole), _squares(gradients.sharded)])
    squares = squares.to(mesh.axes.device_type)
    dist.all_reduce(squares[1], group=mesh.data)
    total = squares.sum()
    dist.all_reduce(total, group=mesh.pipeline)
    norm = math.sqrt(total.item()) if total.isfinite() else total.item()
    scale = max_norm / (norm + _EPSILON)
    if scale < 1 and norm < math.inf:
        torch._foreach_mul_([*gradients.whole, *gradients.sharded], scale)
    return norm


def _squares(tensors: list[Tensor]) -> Tensor:
    """Sum of squares, float64 scalar."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().sum()
