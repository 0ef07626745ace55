"""Sums and all-to-all of numpy arrays over the ranks; nothing happens where torch.distributed is not initialised."""

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Group = dist.ProcessGroup | None
"""None is the default group, or this process alone where torch.distributed is not initialised."""


def place(group: Group) -> tuple[int, int]:
    """Rank and world size; (0, 1) without torch.distributed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def summed(values: Floats, group: Group) -> Floats:
    """Collective. The element-wise sum over ranks, the same bits on each of them."""
    if place(group)[1] == 1:
        return values
    tensor = torch.from_numpy(values.copy()).to(_device(group))
    dist.all_reduce(tensor, group=group)
    return tensor.cpu().numpy()


def gathered(values: Floats, group: Group) -> Floats:
    """Collective. [world, n] from each rank's [n]."""
    rank, world = place(group)
    rows = np.zeros((world, values.size))
    rows[rank] = values
    return summed(rows, group)


def exchanged(columns: list[NDArray[np.generic]], owner: NDArray[np.int64], group: Group) -> list[NDArray[np.generic]]:
    """Collective. Sends element i of every column to rank ``owner[i]``; returns what arrived, in no stated order."""
    world = place(group)[1]
    order = np.argsort(owner, kind="stable")
    sent = np.bincount(owner, minlength=world)
    counts = torch.from_numpy(sent).to(_device(group))
    incoming = torch.empty_like(counts)
    dist.all_to_all_single(incoming, counts, group=group)
    received = incoming.tolist()
    return [_all_to_all(column[order], sent.tolist(), received, group) for column in columns]


def _all_to_all(column: NDArray[np.generic], sent: list[int], received: list[int], group: Group) -> NDArray[np.generic]:
    values = torch.from_numpy(column).to(_device(group))
    result = values.new_empty(sum(received))
    dist.all_to_all_single(result, values, received, sent, group=group)
    return result.cpu().numpy()


def _device(group: Group) -> torch.device:
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
