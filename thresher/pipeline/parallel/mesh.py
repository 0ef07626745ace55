"""p pipeline stages x d replicas over all processes.

p = 4, d = 2        pipeline axis ->
replica 0            0   1   2   3       ranks of a pipeline are neighbours: slices travel between them all the time
replica 1            4   5   6   7       replicas meet once per step and chunk
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from thresher.errors import ConfigError

DATA, PIPELINE = "data", "pipeline"
"""Names of the axes."""


@dataclass(frozen=True)
class PipelineMesh:
    """Where this process stands.

    Attributes:
        axes: the mesh, [replicas, stages], with axes ``data`` and ``pipeline``.
    """

    axes: DeviceMesh

    @property
    def stages(self) -> int:
        """Ranks per pipeline, p."""
        return self.axes.size(1)

    @property
    def replicas(self) -> int:
        """Number of pipelines, d."""
        return self.axes.size(0)

    @property
    def rank(self) -> int:
        """Of this process in its pipeline."""
        return self.axes.get_local_rank(PIPELINE)

    @property
    def replica(self) -> int:
        """The pipeline that this process is part of."""
        return self.axes.get_local_rank(DATA)

    @property
    def data(self) -> ProcessGroup:
        """The processes that hold the same stages."""
        return self.axes.get_group(DATA)

    @property
    def pipeline(self) -> ProcessGroup:
        """The processes of this pipeline, in order of stages."""
        return self.axes.get_group(PIPELINE)

    @property
    def pipelines(self) -> list[list[int]]:
        """Global ranks of each pipeline, in order of stages."""
        ranks: list[list[int]] = self.axes.mesh.tolist()
        return ranks


def make_mesh(stages: int, device_type: str, timeout: timedelta) -> PipelineMesh:
    """As many pipelines of ``stages`` ranks as there are processes for. Collective; makes the groups of both axes.

    Args:
        timeout: how long a collective of these groups may take.

    Raises:
        ConfigError: the number of processes is no multiple of ``stages``.
    """
    world = dist.get_world_size()
    if stages < 1 or world % stages:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(
            f"{world} processes cannot form pipelines of {stages} stages",
            where="pipeline.stages",
            fix=f"start a multiple of {stages} processes, or use stages that divide {world}: {divisors}",
        )
    ranks = torch.arange(world).view(-1, stages)
    groups = [_own_group(along, timeout) for along in (ranks.t(), ranks)]
    axes = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=(DATA, PIPELINE))
    return PipelineMesh(axes)


def _own_group(rows: torch.Tensor, timeout: timedelta) -> ProcessGroup:
    """The group of this process's row of global ranks; every process makes the groups of all rows, in order."""
    made = [(dist.new_group(row, timeout=timeout), row) for row in rows.tolist()]
    own: ProcessGroup
    (own,) = (group for group, row in made if dist.get_rank() in row)
    return own
