"""DCP's planners, for state that is made and taken in piece by piece."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from thresher.sharding.tier_targets import Destination, Outgoing


class SavePlanner(DefaultSavePlanner):
    """Encodes blocks when their turn comes. Of what is replicated, rank 0's copy is saved: it is the one broadcast."""

    def __init__(self) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """What is written."""
        value = self.state_dict[index.fqn]
        return value.encoded() if isinstance(value, Outgoing) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """Asks destinations for memory, and tells them when it is filled.

    Args:
        destinations: by key. DCP puts None in their places in the state dict when it looks for meta tensors in it.
    """

    def __init__(self, destinations: Mapping[str, Destination]) -> None:
        super().__init__()
        self._destinations = destinations

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads."""
        self.state_dict = {**self.state_dict, **self._destinations}
        return super().create_local_plan()

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """What is read into."""
        found = self._destinations.get(index.fqn)
        return super().lookup_tensor(index) if found is None else found.memory(index)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """``tensor`` is what ``read_item`` asked for."""
        found = self._destinations.get(read_item.dest_index.fqn)
        if found is not None:
            found.commit(tensor)
