"""Whether a checkpoint fits the tensors it is to be read into, told before anything is overwritten.

DCP moves rectangles, so a table's weights and element-wise optimizer state load into any split of the table. So does a
state of one number a row (row-wise Adagrad) that is of the whole row, ``[rows]``. Where column splits keep numbers of
their own (``column_state: separate``), there are ``[splits x rows]``, and each is the mean over other columns.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from thresher.errors import CheckpointError
from thresher.sharding.tier_targets import Outgoing

MODEL = "model"
TABLE_OPTIMIZER = "table_optimizer"

Columns = tuple[tuple[int, int], ...]
"""(first column, number of columns) of each split, in order."""


def flattened(state: Mapping[str, Any]) -> dict[str, Any]:
    """Nested state as dotted keys: DCP's own naming, which it does not export."""
    return flatten_state_dict(dict(state))[0]


def local_bytes(state: Mapping[str, Any], rank: int) -> int:
    """Bytes of tensors that ``rank`` writes: its shards, and on rank 0 what is replicated."""
    total = 0
    for value in flattened(state).values():
        if isinstance(value, ShardedTensor):
            total += sum(shard.tensor.nbytes for shard in value.local_shards())
        elif isinstance(value, Outgoing) or (isinstance(value, Tensor) and rank == 0):
            total += value.nbytes
    return total


def misfits(
    wanted: Mapping[str, Any], everyone: Collection[str], parts: Collection[str], saved: Metadata, place: Path
) -> list[CheckpointError]:
    """What keeps the checkpoint ``saved`` in the folder ``place`` from being read into ``wanted``.

    Args:
        wanted: this rank's flattened state.
        everyone: keys of the flattened states of all ranks.
        parts: names of the parts that are asked for; the checkpoint may hold others.
    """
    found = [error for key, value in wanted.items() if (error := _misfit(key, value, wanted, saved, place)) is not None]
    for key in sorted(saved.state_dict_metadata.keys() - set(everyone)):
        if key.partition(".")[0] not in parts:
            continue
        found.append(CheckpointError(f"holds '{key}', which this run does not have", where=str(place), fix=_cure(key)))
    return found


def _misfit(key: str, value: object, wanted: Mapping[str, Any], saved: Metadata, place: Path) -> CheckpointError | None:
    if key not in saved.state_dict_metadata:
        return CheckpointError(f"has no '{key}', which this run needs", where=str(place), fix=_cure(key))
    if not isinstance(value, Tensor | ShardedTensor):
        return None
    found = saved.state_dict_metadata[key]
    if not isinstance(found, TensorStorageMetadata):
        return CheckpointError(
            f"'{key}' is no tensor", where=str(place), fix="load it into the model it was saved from"
        )
    had, wants = _columns_of_state(key, value, wanted, saved)
    if had != wants:
        return CheckpointError(
            f"'{key}' is optimizer state of one number per row and split of the columns: saved for columns "
            f"{_spans(had)}, this plan has {_spans(wants)}",
            where=str(place),
            fix="keep the table's column split, or train with column_state exact, whose state is of whole rows",
        )
    if tuple(found.size) != tuple(value.size()) or found.properties.dtype != value.dtype:
        return CheckpointError(
            f"'{key}' is {found.properties.dtype} {list(found.size)}, "
            f"the model wants {value.dtype} {list(value.size())}",
            where=str(place),
            fix="load it into a model of the same tables and layers",
        )
    return None


def _columns_of_state(
    key: str, value: Tensor | ShardedTensor, wanted: Mapping[str, Any], saved: Metadata
) -> tuple[Columns, Columns]:
    """Column splits with numbers of their own, saved and now, if ``key`` is row-wise state of a table; else nothing.

    The key is ``table_optimizer.state.<parameter>.<table>.<state>``.
    """
    parameter = f"{MODEL}.{key.removeprefix(f'{TABLE_OPTIMIZER}.state.').rsplit('.', 2)[0]}"
    weight, before = wanted.get(parameter), saved.state_dict_metadata.get(parameter)
    state = key.startswith(f"{TABLE_OPTIMIZER}.") and len(value.size()) == 1
    if not (state and isinstance(weight, ShardedTensor) and isinstance(before, TensorStorageMetadata)):
        return (), ()
    rows, dim = weight.size()
    had = tuple(sorted({(chunk.offsets[1], chunk.sizes[1]) for chunk in before.chunks}))
    wants = tuple(sorted({(s.shard_offsets[1], s.shard_sizes[1]) for s in weight.metadata().shards_metadata}))
    stored = saved.state_dict_metadata[key]
    whole = ((0, dim),)
    assert isinstance(stored, TensorStorageMetadata)
    return had if stored.size[0] != rows else whole, wants if value.size()[0] != rows else whole


def _spans(columns: Columns) -> str:
    return ", ".join(f"{first}..{first + count - 1}" for first, count in columns)


def _cure(key: str) -> str:
    """What to do about a key that one side lacks."""
    if key.startswith(f"{TABLE_OPTIMIZER}."):
        return "keep the tables, their tiers and the table optimizer that it was saved with, or load the weights alone"
    return "load it into the model it was saved from"
