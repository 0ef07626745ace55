"""Process groups of a pipeline: one per purpose and direction.

On NCCL the messages of one communicator are served in the order they were posted, so a receive that was posted early
would hold up everything behind it. Separate groups for what flows down, up and around keep them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from thresher.pipeline.schedule.ops import Kind, Payload, Schedule

EXCHANGES = ("exchange", "exchange-back")
"""Channels of a context exchange: to the helper, and back."""


@dataclass(frozen=True)
class Groups:
    """The groups of one pipeline.

    Attributes:
        ranks: global rank of each rank of the pipeline.
        rank: of this process in the pipeline.
        control: for the few collectives of a step.
        channels: by name, see :func:`channel`.
    """

    ranks: tuple[int, ...]
    rank: int
    control: ProcessGroup
    channels: dict[str, ProcessGroup]


def channel(payload: Payload, source: int, target: int) -> str:
    """Name of the group that carries ``payload`` from rank ``source`` to rank ``target`` of a pipeline."""
    wraps = (payload is Payload.ACTIVATION and source > target) or (payload is Payload.GRADIENT and source < target)
    return f"{payload}{'-around' if wraps else ''}"


def make_groups(schedule: Schedule, pipelines: Sequence[Sequence[int]], timeout: timedelta) -> Groups:
    """The groups that ``schedule`` needs. Collective: every rank of every pipeline calls it with the same arguments.

    Args:
        pipelines: global ranks of each pipeline, in order of stages.
        timeout: how long a message may take.
    """
    names = _channels(schedule)
    mine: Groups | None = None
    for ranks in pipelines:
        control = dist.new_group(list(ranks), timeout=timeout)
        channels = {name: dist.new_group(list(ranks), timeout=timeout) for name in names}
        if dist.get_rank() in ranks:
            mine = Groups(tuple(ranks), list(ranks).index(dist.get_rank()), control, channels)
    assert mine is not None, "this rank is part of no pipeline"
    return mine


def _channels(schedule: Schedule) -> list[str]:
    names: set[str] = set()
    for rank, ops in enumerate(schedule.ranks):
        names.update(channel(op.payload, rank, op.peer) for op in ops if op.kind is Kind.SEND and op.payload)
        if any(op.kind in (Kind.EXCHANGE_FORWARD, Kind.EXCHANGE_BACKWARD) for op in ops):
            names.update(EXCHANGES)
    return sorted(names)
