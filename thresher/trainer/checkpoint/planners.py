"""DCP's planners, for state that is made and taken in piece by piece."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
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
        destinations: by key. They are no part of the state dict, in which DCP replaces what it does not know by None.
    """

    def __init__(self, destinations: Mapping[str, Destination]) -> None:
        super().__init__()
        self._destinations = destinations

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads. Keys are taken as they are: DCP's own looks for those that torch 2.3 wrote, and where
        ranks differ in keys it may take this checkpoint for such a one."""
        assert self.metadata is not None
        return create_default_local_load_plan({**self.state_dict, **self._destinations}, self.metadata, strict=True)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """What is read into."""
        found = self._destinations.get(index.fqn)
        return super().lookup_tensor(index) if found is None else found.memory(index)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """``tensor`` is what ``read_item`` asked for."""
        found = self._destinations.get(read_item.dest_index.fqn)
        if found is not None:
            found.commit(tensor)
