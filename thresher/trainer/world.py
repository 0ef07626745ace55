"""Which rank this process is, among how many, and on what it computes. Made by ``launch``, handed down to a run."""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class World:
    """One process of a run.

    Attributes:
        rank: 0 <= rank < world; rank 0 speaks to the user.
        world: processes of the run, over all machines.
        local_rank: rank among the processes of this machine.
        local_world: processes on this machine.
        device: what this rank computes on; the current device already.
        group: the process group of all ranks; None for torch's default group.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    group: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0
