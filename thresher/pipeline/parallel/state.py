"""What a checkpoint holds of a pipeline: tensors by the names and shapes that they have in the whole model.

    layers.{index}...   front...   tail...      whole, or sharded over replicas (FSDP2)
    embedding.weight    head.weight             rows of [vocabulary, D], cut over the ranks of a pipeline

torch's distributed checkpoints put any cut of such tensors together from any other one, so a checkpoint loads into any
number of stages, chunks and replicas, whichever way dense state is held.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.tensor import DTensor

from thresher.pipeline.parallel.dense import DenseState
from thresher.pipeline.parallel.mesh import PipelineMesh
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.vocabulary.rows import row_range

_TABLES = ("embedding.weight", "head.weight")


class ModelState:
    """The weights of one pipeline, for torch's distributed checkpoints (``Stateful``)."""

    def __init__(self, dense: DenseState) -> None:
        self._dense = dense

    def state_dict(self) -> dict[str, Any]:
        """Weights and buffers by name; they share memory with the model's."""
        found = named(self._dense.parts)
        return {name: _global(name, tensor.detach(), tensor, self._dense) for name, tensor in found.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over state of the same structure."""
        for name, tensor in self.state_dict().items():
            _local(tensor).copy_(_local(state_dict[name]))
        self._dense.weights_changed()


class OptimizerState:
    """The optimizer state of one pipeline, by name of the parameter.

    Options such as the learning rate are no part of it: they come from the configuration.
    """

    def __init__(self, dense: DenseState) -> None:
        self._dense = dense

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {name: {key: value}}}``; parameters that have had no gradient have none."""
        return {"state": self._named(self._dense.state())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over state of the same structure, see :meth:`prepare`."""
        state = self._dense.state()
        for name, values in self._named(state).items():
            for key, value in values.items():
                if isinstance(value, Tensor | ShardedTensor):
                    _local(value).copy_(_local(state_dict["state"][name][key]))
        self._dense.take_state(state)

    def prepare(self, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint is read into: state of exactly the parameters that have some in it.

        Args:
            saved: what the checkpoint holds, by ``state.<name>.<key>``.
            facts: none are needed.
        """
        having = {key.removeprefix("state.").rpartition(".")[0] for key in saved}
        names = named(self._dense.parts)
        self._dense.make_state([p for name, p in names.items() if name in having and isinstance(p, nn.Parameter)])
        return self.state_dict()

    def _named(self, state: Mapping[nn.Parameter, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        names = {parameter: name for name, parameter in named(self._dense.parts).items()}
        return {
            names[parameter]: {key: _global(names[parameter], v, parameter, self._dense) for key, v in values.items()}
            for parameter, values in state.items()
        }


def named(parts: RankParts) -> dict[str, Tensor]:
    """Parameters and buffers of ``parts`` by their names in the whole model; one that is shared, once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in parts.state_dict(keep_vars=True).items():  # sharded layers are as they are between steps then
        if id(tensor) not in seen:
            found[re.sub(r"^stages\.\d+\.", "", key)] = tensor
        seen.add(id(tensor))
    return found


def _global(name: str, value: Any, parameter: Tensor, dense: DenseState) -> Any:
    """``value``, which belongs to ``parameter``, as a part of what it is of the whole model."""
    rows = len(parameter) if parameter.dim() else 0
    cut = name in _TABLES and rows != dense.parts.vocabulary
    if not cut or not isinstance(value, Tensor) or not value.dim() or len(value) != rows:
        return value
    return _rows(value, dense.parts.vocabulary, dense.mesh)


def _rows(local: Tensor, vocabulary: int, mesh: PipelineMesh) -> ShardedTensor:
    ranks = mesh.pipelines[mesh.replica]
    columns = local.shape[1:]
    places = []
    for part, rank in enumerate(ranks):
        first, last = row_range(vocabulary, mesh.stages, part)
        device = torch.device(local.device.type) if local.device.type == "cpu" else local.device
        places.append(ShardMetadata([first, *(0 for _ in columns)], [last - first, *columns], f"rank:{rank}/{device}"))
    whole = ShardedTensorMetadata(places, torch.Size([vocabulary, *columns]), TensorProperties(dtype=local.dtype))
    found: ShardedTensor = ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(local, places[mesh.rank])], whole, process_group=mesh.pipeline
    )
    return found


def _local(value: Any) -> Tensor:
    """What this process holds of a tensor."""
    if isinstance(value, ShardedTensor):
        local: Tensor = value.local_shards()[0].tensor
        return local
    assert isinstance(value, Tensor)
    return value.to_local() if isinstance(value, DTensor) else value
