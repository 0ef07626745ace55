"""The store of a pipeline of one rank and one chunk."""

from collections.abc import Sequence

from thresher.pipeline.attention.regions import plan_regions
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.layout import Layout
from thresher.pipeline.schedule.ops import Kind, Op, Schedule, Shape


def in_turn(microbatches: int, slices: int, chunks: int = 1) -> list[Op]:
    """Forwards of a microbatch, then its backwards, then the next one's."""
    order = [(chunk, index) for chunk in range(chunks) for index in range(slices)]
    ops: list[Op] = []
    for number in range(microbatches):
        ops += [Op(Kind.FORWARD, number, *place) for place in order]
        ops += [Op(Kind.BACKWARD, number, *place) for place in reversed(order)]
    return ops


def one_rank_store(layouts: Sequence[Layout]) -> KVStore:
    """For microbatches of ``layouts``, one at a time."""
    shape = Shape(1, 1, len(layouts), layouts[0].slices)
    schedule = Schedule(shape, (tuple(in_turn(shape.microbatches, shape.slices)),))
    return KVStore(plan_regions(schedule, 0, layouts)[0])
