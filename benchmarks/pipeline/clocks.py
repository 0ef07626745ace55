"""What a step costs a rank: wall, its thread's CPU, and time spent in waits for messages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from thresher.pipeline.schedule.ops import Kind

CLEAN = 0.06
"""Largest share of the wall in which a rank neither computes nor waits for a message: another process had the core."""


@dataclass(frozen=True)
class Reading:
    """One step of one rank, in seconds."""

    wall: float
    cpu: float
    wait: float

    @property
    def disturbed(self) -> float:
        """Share of the wall that is neither CPU nor waiting."""
        return (self.wall - self.cpu - self.wait) / self.wall if self.wall else 0.0


def is_clean(readings: list[Reading]) -> bool:
    """Whether no rank was disturbed."""
    return all(reading.disturbed < CLEAN for reading in readings)


class Clock:
    """Takes readings of steps. Waits are seen wherever they happen: every transfer of torch is waited for by ``Work``.

    Attributes:
        waited: seconds this process has waited so far.
    """

    def __init__(self) -> None:
        self.waited = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, waits of this process are timed."""
        plain = dist.Work.wait

        def wait(work: dist.Work, *args: object) -> object:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return plain(work, *args)  # type: ignore[arg-type]
            finally:
                self.waited += time.perf_counter() - wall - (time.thread_time() - cpu)

        dist.Work.wait = wait  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            dist.Work.wait = plain  # type: ignore[method-assign]

    @contextmanager
    def reading(self, into: list[Reading]) -> Iterator[None]:
        """Appends the reading of what runs inside."""
        wall, cpu, waited = time.perf_counter(), time.thread_time(), self.waited
        yield
        into.append(Reading(time.perf_counter() - wall, time.thread_time() - cpu, self.waited - waited))


@dataclass
class OpTimes:
    """Thread-CPU seconds of operations, by (kind, stage, slice), one entry a microbatch."""

    seconds: dict[tuple[Kind, int, int], list[float]] = field(default_factory=dict)

    @contextmanager
    def of(self, kind: Kind, stage: int, index: int = 0) -> Iterator[None]:
        """Times one operation."""
        start = time.thread_time()
        yield
        self.add(kind, stage, index, time.thread_time() - start)

    def add(self, kind: Kind, stage: int, index: int, seconds: float) -> None:
        """Notes one operation."""
        self.seconds.setdefault((kind, stage, index), []).append(seconds)
