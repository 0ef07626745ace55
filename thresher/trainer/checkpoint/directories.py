"""Which row belongs to which raw id, as a part of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thresher.embeddings.dynamic.directory import IdDirectory
from thresher.embeddings.dynamic.id_map import Ids
from thresher.errors import CheckpointError
from thresher.sharding.model import ShardedModel


class Directories:
    """The directories of this rank's shards of tables with raw ids; one vector of int64 each.

    An id belongs to the rank that the table's cut gives it, so a checkpoint loads into the same cut only.
    """

    def __init__(self, sharded: ShardedModel) -> None:
        self._directories: dict[str, IdDirectory] = {} if sharded.held is None else sharded.held.directories()

    def state_dict(self) -> dict[str, Tensor]:
        """By shard."""
        return {key: _packed(directory.state()) for key, directory in self._directories.items()}

    def facts(self) -> dict[str, Any]:
        """Rows of each shard."""
        return {key: directory.capacity for key, directory in self._directories.items()}

    def prepare(self, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """What is read into.

        Raises:
            CheckpointError: the table was cut otherwise, or its ids were rows.
        """
        for key, directory in self._directories.items():
            if facts.get(key) != directory.capacity:
                table = key.partition(":")[0]
                raise CheckpointError(
                    f"table '{table}' has raw ids and was cut otherwise: this rank holds {directory.capacity} rows as "
                    f"'{key}', the checkpoint has {', '.join(sorted(facts)) or 'none'}",
                    where=f"table '{table}'",
                    fix="load it on as many ranks and with the sharding that it was saved with",
                )
        return {key: torch.empty(saved[key].size, dtype=torch.int64) for key in self._directories}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        for key, directory in self._directories.items():
            directory.load(_unpacked(state_dict[key], list(directory.state())))


def _packed(state: Mapping[str, Ids]) -> Tensor:
    """[k + n]: k lengths, then the k arrays one after the other."""
    lengths = np.array([len(array) for array in state.values()], np.int64)
    return torch.from_numpy(np.concatenate([lengths, *state.values()]))


def _unpacked(packed: Tensor, names: list[str]) -> dict[str, Ids]:
    lengths, values = np.split(packed.numpy(), [len(names)])
    return dict(zip(names, np.split(values, np.cumsum(lengths)[:-1]), strict=True))
