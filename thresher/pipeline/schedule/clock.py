"""When operations start by a clock on which each takes as long as its work is, all ranks at once."""

from collections.abc import Mapping, Sequence

Place = tuple[int, int]
"""A rank, and the position of a compute operation in its list."""


def start_times(
    ticks: Sequence[Sequence[int]], waits: Mapping[Place, Sequence[Place]], partners: Mapping[Place, Place]
) -> list[list[int]]:
    """By rank and position, the tick at which each compute operation starts when all start as early as they can.

    Whatever must come before an operation starts at an earlier tick, as all take more than 0.

    Args:
        ticks: what each compute operation takes, by rank and position; above 0.
        waits: for places that need results of other ranks, the places that make them.
        partners: for places that share attention, the place that starts together with it.
    """
    starts: list[list[int]] = [[] for _ in ticks]
    ends: list[list[int]] = [[0] for _ in ticks]
    moved = True
    while moved:
        moved = False
        for rank, taken in enumerate(ticks):
            while len(starts[rank]) < len(taken):
                own = (rank, len(starts[rank]))
                group = (own, partners[own]) if own in partners else (own,)
                before = [place for each in group for place in waits.get(each, ())]
                if any(len(starts[r]) != at for r, at in group) or any(len(starts[r]) <= at for r, at in before):
                    break
                begin = max([ends[r][-1] for r, _ in group] + [ends[r][at + 1] for r, at in before])
                for r, at in group:
                    starts[r].append(begin)
                    ends[r].append(begin + ticks[r][at])
                moved = True
    assert [*map(len, starts)] == [*map(len, ticks)], "operations wait in a circle"
    return starts
