"""Layers sharded over the replicas: FSDP2 inside the stages of a pipeline."""

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from thresher.pipeline.parallel.dense import (
    BucketedSum,
    Gradients,
    TorchState,
    trained,
    vocabulary_parameters,
)
from thresher.pipeline.parallel.mesh import DATA, PipelineMesh
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.vocabulary.arithmetic import gradient_of


class ShardedLayers(TorchState):
    """Between steps every replica holds 1/d of each layer, of its gradients and of its optimizer state.

    A layer is gathered by the first slice that runs through it, stays whole until the last backward of its chunk, and
    is reduce-scattered then: once per step, not once per slice. Embedding and output layer, which are not called
    through ``forward``, are whole on every replica. On gloo the reduction does not run in the background.

    Args:
        bucket_bytes: about how much of the embedding's and output layer's gradients is reduced at a time.
    """

    def __init__(self, parts: RankParts, mesh: PipelineMesh, bucket_bytes: int = 25 << 20) -> None:
        super().__init__(parts, mesh)
        self._sums = BucketedSum(mesh.data, bucket_bytes)
        for chunk in range(len(parts.stages)):
            stage = parts.stage(chunk)
            for module in [*stage.layers.values(), stage]:
                sharded = fully_shard(module, mesh=mesh.axes[DATA], reshard_after_forward=False)
                sharded.set_gradient_divide_factor(1.0)
                sharded.set_force_sum_reduction_for_comms(True)
            _hold(stage)

    def gradients(self) -> Gradients:
        """See :class:`DenseState`."""
        found = Gradients()
        for parameter in trained(self.parts):
            gradient = gradient_of(parameter)
            if isinstance(gradient, DTensor):
                found.sharded.append(gradient.to_local())
            else:
                found.whole.append(gradient)
        return found

    def weights_changed(self) -> None:
        """See :class:`DenseState`; layers that are still gathered are let go of, as their shards are newer now."""
        for module in self.parts.stages.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _reduce(self, chunk: int) -> None:
        stage = self.parts.stage(chunk)
        _let_go(stage)
        _hold(stage)

    def _finish(self) -> None:
        self._sums.start(vocabulary_parameters(self.parts))
        self._sums.wait()


def _hold(stage: nn.Module) -> None:
    """Keeps the layers of ``stage`` gathered and their gradients where they are, slice after slice."""
    assert isinstance(stage, FSDPModule)
    stage.set_is_last_backward(False)
    stage.set_reshard_after_backward(False)
    stage.set_requires_gradient_sync(False)


def _let_go(stage: nn.Module) -> None:
    """Reduce-scatters the gradients of ``stage`` and frees its gathered layers.

    FSDP would do so in hooks of the last backward, but weight gradients that were put off come after it. torch's own
    pipelines end a stage in the same way (``_PipelineStageBase.perform_reduce_grad``).
    """
    assert isinstance(stage, FSDPModule)
    stage.set_is_last_backward(True)
    stage.set_reshard_after_backward(True)
    stage.set_requires_gradient_sync(True)
    root = fully_shard.state(stage)  # type: ignore[attr-defined]
    for state in root._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            group.post_backward()
    root._root_post_backward_final_callback()
