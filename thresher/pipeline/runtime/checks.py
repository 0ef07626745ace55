"""What must hold before the first operation runs."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

from thresher.errors import ScheduleError
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.stage import RankParts
from thresher.pipeline.runtime.transport import Transport
from thresher.pipeline.schedule.ops import Kind, Op, Schedule
from thresher.pipeline.vocabulary.rows import require_rows


def require_same_pipeline(schedule: Schedule, parts: RankParts, options: RuntimeOptions, transport: Transport) -> None:
    """Refuses ranks that run different schedules, or in another way, or hold parts of different models. Collective.

    Raises:
        ScheduleError: names the ranks that differ.
    """
    transport.require_same(digest(schedule), "schedule")
    transport.require_same(digest(options.recompute, options.autocast, options.seed), "recompute, autocast or seed")
    sizes = (parts.width, parts.layers, parts.vocabulary, parts.dtype)
    transport.require_same(digest(*sizes), "width, depth, vocabulary or dtype of the model")
    if schedule.shape.split_head:
        transport.require_same(digest(*_output(parts)), "output layer")
    shared = [op for ops in schedule.ranks for op in ops if op.kind in (Kind.EXCHANGE_FORWARD, Kind.EXCHANGE_BACKWARD)]
    if shared:
        layers = [len(parts.stage(chunk).layers) for chunk in range(schedule.shape.chunks)]
        transport.require_same(digest(layers), "number of layers by chunk, which a context exchange needs")
        _require_equal_chunks(shared, layers)


def _output(parts: RankParts) -> tuple[object, ...]:
    """What the parts of a cut output layer have in common."""
    assert parts.head is not None
    is_tied = parts.embedding is not None and parts.embedding.weight is parts.head.weight
    return type(parts.head).__qualname__, parts.head.statistics, is_tied


def _require_equal_chunks(shared: Sequence[Op], layers: Sequence[int]) -> None:
    """Operations share attention layer by layer, also those of different chunks."""
    for op in shared:
        if op.partner is not None and layers[op.chunk] != layers[op.partner[1]]:
            raise ScheduleError(
                f"chunks {op.chunk} and {op.partner[1]} hold {layers[op.chunk]} and {layers[op.partner[1]]} layers and "
                "share attention",
                where="pipeline.exchange",
                fix="give a number of layers that stages times chunks divides, or no exchange",
            )


def require_usable(schedule: Schedule, microbatches: Sequence[Microbatch], parts: RankParts) -> None:
    """Refuses microbatches that the schedule cannot run.

    Raises:
        ScheduleError: their number, slices or shapes do not fit.
        BadIds: an id is no row of the embedding, or a target none of the output layer.
    """
    shape = schedule.shape
    if len(microbatches) != shape.microbatches:
        raise ScheduleError(
            f"{len(microbatches)} microbatches were given, the schedule has {shape.microbatches}",
            where="pipeline.microbatches",
            fix="hand in as many as the schedule was built for",
        )
    if len({microbatch.are_vectors for microbatch in microbatches}) > 1:
        raise ScheduleError("some inputs are ids and some vectors", where="microbatches", fix="use one of them")
    if microbatches[0].are_vectors and shape.split_embedding:
        raise ScheduleError(
            "inputs are vectors, but the schedule looks up embeddings",
            where="pipeline.split_embedding",
            fix="build the schedule without split_embedding",
        )
    for number, microbatch in enumerate(microbatches):
        _require_cut(schedule, microbatch, f"microbatch {number}")
        _require_shapes(microbatch, parts, f"microbatch {number}")
        require_rows(microbatch, number, parts.vocabulary)


def _require_cut(schedule: Schedule, microbatch: Microbatch, where: str) -> None:
    layout = microbatch.layout
    if layout.slices != schedule.shape.slices:
        raise ScheduleError(
            f"is cut into {layout.slices} slices, the schedule has {schedule.shape.slices}",
            where=where,
            fix="cut it into as many as the schedule was built for",
        )
    if any(layout.length(index) < 1 for index in range(layout.slices)) or layout.bounds[0]:
        raise ScheduleError(
            f"{layout.tokens} tokens do not fill {layout.slices} slices: bounds {layout.bounds}",
            where=where,
            fix="give every slice at least one token: fewer slices, or longer sequences",
        )
    edges = (*layout.starts, layout.tokens)
    if edges[0] or any(high <= low for low, high in pairwise(edges)):
        raise ScheduleError(
            f"holds a sequence of no tokens: they start at {layout.starts[:20]} of {layout.tokens}",
            where=where,
            fix="leave sequences without tokens out",
        )
    if layout.is_packed and layout.batch != 1:
        raise ScheduleError(
            f"has {layout.batch} rows of packed sequences", where=where, fix="pack all sequences into one row"
        )


def _require_shapes(microbatch: Microbatch, parts: RankParts, where: str) -> None:
    layout, width = microbatch.layout, parts.width
    tokens = (layout.batch, layout.tokens)
    wanted = {
        "inputs": (microbatch.inputs, (*tokens, width) if microbatch.are_vectors else tokens),
        "targets": (microbatch.targets, tokens),
        "weights": (microbatch.weights, tokens),
    }
    if microbatch.times is not None:
        wanted["times"] = (microbatch.times, tokens)
    for name, (values, shape) in wanted.items():
        if tuple(values.shape) != shape:
            raise ScheduleError(
                f"{name} have shape {list(values.shape)}, the layout says {list(shape)}",
                where=where,
                fix="give every tensor the layout's rows and tokens",
            )


def checksums(microbatches: Sequence[Microbatch]) -> list[int]:
    """Sums of ids, targets and times by microbatch: different, but for chance, where the tokens are."""
    given = [(None if m.are_vectors else m.inputs, m.targets, m.times) for m in microbatches]
    return [int(values.sum()) for tensors in given for values in tensors if values is not None]


def digest(*facts: object) -> int:
    """A number of 63 bits that differs where ``facts`` do."""
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "little") >> 1
