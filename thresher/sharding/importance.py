"""How much each sample of the global batch counts for the priorities of rows, on every rank.

The owner of a shard sees the bags of all ranks, rank after rank: 0 1 2 3. Under table-row-wise and grid sharding
TorchRec orders the ranks by their place on the machine first: 0 2 1 3 for two machines of two, since the sums of one
machine's ranks are added up before they go to other machines.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from thresher.sharding.engine import Engine


class Importance:
    """Gathers the samples' importance from all ranks.

    Args:
        local_world: ranks of a machine.
    """

    def __init__(self, engine: Engine, group: ProcessGroup, local_world: int) -> None:
        self._engine, self._group = engine, group
        world = group.size()
        self._staggered = [rank for place in range(local_world) for rank in range(place, world, local_world)]

    def observe(self, own: Tensor) -> None:
        """Takes this rank's [B] fp32 (B may differ between ranks) for the next backward. Collective."""
        parts = self._gathered(own.to(torch.float32))
        self._engine.in_order.importance = torch.cat(parts)
        self._engine.staggered.importance = torch.cat([parts[rank] for rank in self._staggered])

    def _gathered(self, own: Tensor) -> list[Tensor]:
        if self._group.size() == 1:
            return [own]
        sizes = own.new_empty(self._group.size(), dtype=torch.int64)
        dist.all_gather_into_tensor(sizes, torch.tensor([len(own)], device=own.device), group=self._group)
        counts = sizes.tolist()
        padded = own.new_zeros(max(counts))
        padded[: len(own)] = own
        every = own.new_empty(len(counts) * max(counts))
        dist.all_gather_into_tensor(every, padded, group=self._group)
        return [row[:count] for row, count in zip(every.view(len(counts), -1), counts, strict=True)]
