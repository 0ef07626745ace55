"""A clock with typical costs, by which operations and transfers are placed.

Whether a schedule works never depends on what operations really cost; only how well it fits does.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from thresher.pipeline.schedule.ops import Kind, Op

COSTS = MappingProxyType(
    {
        Kind.FORWARD: 20,
        Kind.BACKWARD: 40,
        Kind.INPUT_BACKWARD: 20,
        Kind.WEIGHT_BACKWARD: 20,
        Kind.HEAD: 5,
        Kind.HEAD_WEIGHT: 5,
        Kind.LOSS: 1,
        Kind.EMBED: 1,
        Kind.EMBED_BACKWARD: 1,
    }
)
"""Ticks that an operation takes, by kind."""

Place = tuple[int, int]
"""A rank, and the position of a compute operation in its list."""


def start_times(
    lists: Sequence[Sequence[Op]], waits: Mapping[Place, Sequence[Place]], partners: Mapping[Place, Place]
) -> list[list[int]]:
    """By rank and position, the tick at which each compute operation starts when all start as early as they can.

    Whatever must come before an operation starts at an earlier tick, as all costs are above 0.

    Args:
        lists: compute operations by rank.
        waits: for places that need results of other ranks, the places that make them.
        partners: for places that share attention, the place that starts together with it.
    """
    starts: list[list[int]] = [[] for _ in lists]
    ends: list[list[int]] = [[0] for _ in lists]
    moved = True
    while moved:
        moved = False
        for rank, ops in enumerate(lists):
            while len(starts[rank]) < len(ops):
                own = (rank, len(starts[rank]))
                group = (own, partners[own]) if own in partners else (own,)
                before = [place for each in group for place in waits.get(each, ())]
                if any(len(starts[r]) != at for r, at in group) or any(len(starts[r]) <= at for r, at in before):
                    break
                begin = max([ends[r][-1] for r, _ in group] + [ends[r][at + 1] for r, at in before])
                for r, at in group:
                    starts[r].append(begin)
                    ends[r].append(begin + COSTS[lists[r][at].kind])
                moved = True
    assert all(len(start) == len(ops) for start, ops in zip(starts, lists, strict=True)), "operations wait in a circle"
    return starts
