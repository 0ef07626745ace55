"""Which forward and backward each rank does when: SlimPipe (arXiv 2504.14519) and the schedules it is compared with.

Every policy is a sequence of forwards, a sequence of backwards, and how many forwards may be in flight: that many come
first, then backwards and forwards alternate, then the rest of the backwards. A rank of SlimPipe with n * v = 4 slices
of m = 2 microbatches and a target of T = 5:

    F F F F F B F B F B F B B B B B
    |---T---|  alternate  |-drain-|
"""

from collections.abc import Iterator

from thresher.errors import ScheduleError, nearest
from thresher.pipeline.schedule.ops import POLICIES, Kind, Op, Shape

Orders = tuple[tuple[Op, ...], ...]
"""By rank: its FORWARD and BACKWARD operations, each once, in the order they are executed."""

_Place = tuple[int, int, int]  # microbatch, chunk, slice


def compute_orders(shape: Shape) -> Orders:
    """The forwards and backwards of every rank.

    Raises:
        ScheduleError: the policy cannot make a schedule of this shape (see :func:`check_shape`).
    """
    check_shape(shape)
    ahead = [Op(Kind.FORWARD, *place) for place in _forwards(shape)]
    back = [Op(Kind.BACKWARD, *place) for place in _backwards(shape)]
    return tuple(tuple(_alternate(ahead, back, in_flight(shape, rank))) for rank in range(shape.stages))


def in_flight(shape: Shape, rank: int) -> int:
    """The most slice-chunks that ``rank`` holds between their forward and their backward.

    At most everything, m n v. SlimPipe: n v + w (p - 1 - r). 1F1B over slices (arXiv:2406.03488) and over microbatches:
    n + p - 1 - r. Interleaved 1F1B: as in Megatron-LM and torch, in rounds of about p microbatches. Others: everything.
    """
    hops = shape.stages - 1 - rank
    everything = shape.microbatches * shape.slices * shape.chunks
    match shape.policy:
        case "slimpipe":
            target = shape.slices * shape.chunks + shape.slack * hops
        case "1f1b" | "seq1f1b":
            target = shape.slices + hops
        case "interleaved":
            target = (shape.chunks - 1) * _round(shape) + 2 * hops + 1
        case _:
            target = everything
    return min(target, everything)


def group_size(shape: Shape) -> int:
    """Slices that visit one chunk before the next chunk takes over: the smallest divisor of n that is >= p."""
    return next(size for size in range(shape.stages, shape.slices + 1) if shape.slices % size == 0)


def check_shape(shape: Shape) -> None:
    """Refuses what no schedule can be made of.

    Raises:
        ScheduleError: a count below 1, a slack that is not 1 or 2, an unknown policy, or a policy that cannot have
            these slices, chunks or microbatches.
    """
    for name in ("stages", "chunks", "microbatches", "slices"):
        if getattr(shape, name) < 1:
            raise _refused(name, f"{getattr(shape, name)} {name}", f"give at least 1 for {name}")
    if shape.slack not in (1, 2):
        raise _refused("slack", f"slack {shape.slack}", "1 holds fewest slices, 2 hides the transfers")
    if shape.policy not in POLICIES:
        raise _refused("policy", f"no policy '{shape.policy}'", nearest(shape.policy, POLICIES))
    _check_policy(shape)


def _check_policy(shape: Shape) -> None:
    policy, slices = shape.policy, shape.slices
    if policy == "slimpipe" and slices < shape.stages:
        what = f"{slices} slices are too few for {shape.stages} stages"
        raise _refused("slices", what, f"slimpipe needs slices >= stages; give {shape.stages} or a multiple of it")
    if policy in ("gpipe", "1f1b", "interleaved") and slices != 1:
        what = f"policy '{policy}' does not cut sequences, but there are {slices} slices"
        raise _refused("slices", what, "give 1 slice, or policy 'slimpipe'")
    if policy in ("1f1b", "terapipe", "seq1f1b") and shape.chunks != 1:
        what = f"policy '{policy}' has one chunk per rank, not {shape.chunks}"
        raise _refused("chunks", what, "give 1 chunk, or policy 'slimpipe' or 'interleaved'")
    if policy == "interleaved" and shape.microbatches % _rounds(shape):
        what = f"{shape.microbatches} microbatches do not make {_rounds(shape)} equal rounds on {shape.stages} stages"
        raise _refused("microbatches", what, f"give a multiple of {shape.stages}, or policy 'slimpipe'")


def _refused(name: str, what: str, fix: str) -> ScheduleError:
    return ScheduleError(what, where=f"pipeline.{name}", fix=fix)


def _alternate(ahead: list[Op], back: list[Op], target: int) -> Iterator[Op]:
    yield from ahead[:target]
    for backward, forward in zip(back, ahead[target:], strict=False):
        yield backward
        yield forward
    yield from back[len(ahead) - target :]


def _forwards(shape: Shape) -> list[_Place]:
    if shape.policy == "slimpipe":
        return [(k, *place) for k in range(shape.microbatches) for place in _one_microbatch(shape)]
    return [(k, c, i) for ks in _batches(shape) for c in range(shape.chunks) for k in ks for i in range(shape.slices)]


def _backwards(shape: Shape) -> list[_Place]:
    # Within a microbatch always the reverse of the forwards: the keys and values of a slice gather gradients from all
    # later slices first.
    if shape.policy == "slimpipe":
        return [(k, *place) for k in range(shape.microbatches) for place in reversed(_one_microbatch(shape))]
    chunks, slices = range(shape.chunks)[::-1], range(shape.slices)[::-1]
    return [(k, c, i) for ks in _batches(shape) for c in chunks for k in ks for i in slices]


def _one_microbatch(shape: Shape) -> list[tuple[int, int]]:
    """(chunk, slice) in cycles of :func:`group_size` slices, so that interleaving needs no second microbatch."""
    size = group_size(shape)
    cycles = range(0, shape.slices, size)
    return [(c, i) for first in cycles for c in range(shape.chunks) for i in range(first, first + size)]


def _batches(shape: Shape) -> list[range]:
    """Microbatches that visit one chunk before the next chunk takes over."""
    size = _round(shape) if shape.policy == "interleaved" else shape.microbatches
    return [range(first, first + size) for first in range(0, shape.microbatches, size)]


def _rounds(shape: Shape) -> int:
    return max(1, shape.microbatches // shape.stages)


def _round(shape: Shape) -> int:
    return shape.microbatches // _rounds(shape)
