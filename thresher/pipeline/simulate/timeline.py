"""When each operation of a schedule ran: what the simulator finds, and what a measured run can be turned into."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from thresher.pipeline.schedule.graph import COMPUTE
from thresher.pipeline.schedule.ops import Kind, Op, Schedule


class Event(NamedTuple):
    """An operation that took time.

    Attributes:
        op: a compute operation.
        start, end: seconds from the beginning of the step.
        worked: seconds of these that the rank computed; less than all where it waited for a peer's part of a shared
            operation.
        waited: seconds the rank did nothing before ``start``.
    """

    op: Op
    start: float
    end: float
    worked: float
    waited: float


class Transfer(NamedTuple):
    """A message.

    Attributes:
        op: the SEND.
        source, target: ranks.
        posted: when SEND was executed.
        start, end: when it was under way.
        size_bytes: of the message.
    """

    op: Op
    source: int
    target: int
    posted: float
    start: float
    end: float
    size_bytes: float


class Step(NamedTuple):
    """One entry of a rank's list.

    Attributes:
        op: any operation.
        start, end: seconds; equal for operations that take no time.
        worked: as in :class:`Event`; 0 for what does not compute.
    """

    op: Op
    start: float
    end: float
    worked: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """A step of a schedule in time.

    Attributes:
        schedule: that was run.
        steps: by rank, when each entry of its list was executed.
        transfers: all messages, in the order they arrive.
    """

    schedule: Schedule
    steps: tuple[tuple[Step, ...], ...]
    transfers: tuple[Transfer, ...] = ()

    @cached_property
    def events(self) -> tuple[tuple[Event, ...], ...]:
        """By rank, compute operations in the order they ran."""
        return tuple(tuple(_events(steps)) for steps in self.steps)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the beginning of the step to the end of its last operation."""
        return max((step.end for steps in self.steps for step in steps), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds each rank computes."""
        return tuple(sum(event.worked for event in events) for events in self.events)

    @property
    def ideal(self) -> float:
        """Seconds a step would take if all ranks computed all the time: the mean of :attr:`busy`."""
        return sum(self.busy) / len(self.busy)

    @property
    def bubble(self) -> float:
        """Time lost over ideal time, as the papers count it: (p - 1) / (n v m) for SlimPipe at uniform cost."""
        return (self.makespan - self.ideal) / self.ideal if self.ideal else 0.0

    @property
    def bubbles(self) -> tuple[float, ...]:
        """By rank, seconds it does nothing over :attr:`ideal`."""
        return tuple((self.makespan - busy) / self.ideal if self.ideal else 0.0 for busy in self.busy)

    @property
    def peak_slices(self) -> tuple[int, ...]:
        """By rank, most slices (times chunks) whose activations are kept at once."""
        return tuple(_peak(ops) for ops in self.schedule.ranks)


def _events(steps: Sequence[Step]) -> list[Event]:
    events, free = [], 0.0
    for step in steps:
        if step.op.kind in COMPUTE:
            events.append(Event(*step, waited=step.start - free))
            free = step.end
    return events


def _peak(ops: Sequence[Op]) -> int:
    live = peak = 0
    for op in ops:
        live += live_change(op)
        peak = max(peak, live)
    return peak


def live_change(op: Op) -> int:
    """+1 where ``op`` begins to keep activations of a slice, -1 where the last of them are gone.

    >>> live_change(Op(Kind.INPUT_BACKWARD, 0, 0, 0))  # the weight part still needs them
    0
    """
    if op.kind is Kind.FORWARD:
        return 1
    return -1 if op.kind in (Kind.BACKWARD, Kind.WEIGHT_BACKWARD) else 0
