"""A timeline as a trace for https://ui.perfetto.dev and chrome://tracing (Chrome's Trace Event Format, JSON)."""

from collections.abc import Iterator

from thresher.pipeline.simulate.memory import Memory
from thresher.pipeline.simulate.timeline import Timeline, Transfer

PER_SECOND = 1e6
"""The format counts in microseconds."""

Entry = dict[str, object]


def trace(timeline: Timeline, memory: Memory) -> dict[str, object]:
    """The document: one process per rank with its operations, arrows for messages, counters for bytes.

    Args:
        timeline: of the operations.
        memory: predicted for it.
    """
    entries = [
        *_names(len(timeline.steps)),
        *_operations(timeline),
        *(entry for number, transfer in enumerate(timeline.transfers) for entry in _arrow(number, transfer)),
        *_counters(memory),
    ]
    return {"displayTimeUnit": "ms", "traceEvents": entries}


def _names(ranks: int) -> Iterator[Entry]:
    for rank in range(ranks):
        yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        for thread, name in enumerate(("compute", "sends", "receives")):
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}}


def _operations(timeline: Timeline) -> Iterator[Entry]:
    for rank, events in enumerate(timeline.events):
        for event in events:
            op = event.op
            yield {
                "ph": "X",
                "name": f"{op.kind}({op.microbatch},{op.chunk},{op.slice})",
                "cat": op.kind.name.lower(),
                "pid": rank,
                "tid": 0,
                "ts": event.start * PER_SECOND,
                "dur": (event.end - event.start) * PER_SECOND,
                "args": {
                    "microbatch": op.microbatch,
                    "chunk": op.chunk,
                    "slice": op.slice,
                    "worked_us": event.worked * PER_SECOND,
                    "waited_us": event.waited * PER_SECOND,
                },
            }


def _arrow(number: int, transfer: Transfer) -> Iterator[Entry]:
    """The message at both ends, and a flow between them."""
    op = transfer.op
    name = f"{op.payload}({op.microbatch},{op.chunk},{op.slice})"
    common: Entry = {"name": name, "cat": "message"}
    when: Entry = {"ts": transfer.start * PER_SECOND, "dur": (transfer.end - transfer.start) * PER_SECOND}
    details: Entry = {"args": {"bytes": transfer.size_bytes, "posted_us": transfer.posted * PER_SECOND}}
    yield common | when | details | {"ph": "X", "pid": transfer.source, "tid": 1}
    yield common | when | details | {"ph": "X", "pid": transfer.target, "tid": 2}
    yield common | {"ph": "s", "id": number, "pid": transfer.source, "tid": 1, "ts": when["ts"]}
    yield common | {"ph": "f", "bp": "e", "id": number, "pid": transfer.target, "tid": 2, "ts": when["ts"]}


def _counters(memory: Memory) -> Iterator[Entry]:
    for rank, points in enumerate(memory.curves):
        for point in points:
            args = {str(kind): size for kind, size in point.held.items()}
            yield {"ph": "C", "name": "bytes", "pid": rank, "tid": 0, "ts": point.time * PER_SECOND, "args": args}
