"""Stages that sleep instead of computing: real schedules, messages and exchanges on the wall clock, without cores.

A layer sleeps for the pairs of a query and a key that this rank attends to, wherever they come from. With an exchange,
the giver leaves out the pairs it gives away and waits for the answer; the helper sleeps for them before it answers:

    giver   asks | own pairs ......| waits for the answer
    helper       | own pairs ......| waits to be asked | their pairs | answers
"""

import math
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchmarks import measure
from benchmarks.pipeline.clocks import Clock
from tests.multi.harness import run_ranks
from thresher.pipeline.attention.port import Port
from thresher.pipeline.attention.sliced import SlicedContext
from thresher.pipeline.context import SliceContext, TrunkLayer
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import RankParts, StageModule
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.graph import COMPUTE
from thresher.pipeline.schedule.ops import Op, Schedule
from thresher.pipeline.schedule.work import Work
from thresher.pipeline.simulate.costs import Costs
from thresher.pipeline.simulate.simulator import simulate
from thresher.pipeline.vocabulary.softmax import SoftmaxHead

MESSAGE: tuple[tuple[int, ...], torch.dtype] = ((1,), torch.float32)


@dataclass(frozen=True)
class Case:
    """One pipeline of sleepers.

    Attributes:
        linear_s: sleep of a forward through one chunk, all but attention; a backward takes twice as long.
        attention: mean sleep for attention over ``linear_s``; 0 for none.
        exchange: whether ranks share their attention.
    """

    stages: int
    chunks: int
    microbatches: int
    slices: int
    linear_s: float
    attention: float = 0.0
    exchange: bool = False

    @property
    def floor(self) -> float:
        """The bubble of slices of equal cost, (p - 1) / (n v m)."""
        return (self.stages - 1) / (self.slices * self.chunks * self.microbatches)

    def schedule(self) -> Schedule:
        """Its lists."""
        rule, work = ExchangeRule() if self.exchange else None, Work(self.attention)
        return build_schedule(self.stages, self.chunks, self.microbatches, self.slices, exchange=rule, work=work)

    def seconds(self, index: int, share: int = 0) -> float:
        """A forward's attention of slice ``index`` that is left when its ``share`` oldest slices are moved."""
        return self.linear_s * self.attention * (2 * (index - share) + 1) / self.slices

    def moved(self, index: int, share: int) -> float:
        """A forward's attention of slice ``index`` over its ``share`` oldest slices."""
        return self.seconds(index) - self.seconds(index, share)


class Sleeper(TrunkLayer):
    """A layer that sleeps. Its parameter takes part in nothing but the names of gradients.

    Attributes:
        pace: how much longer than ``case`` says; 0 for a warm-up.
    """

    pace = 0.0

    def __init__(self, case: Case, index: int) -> None:
        super().__init__()
        self.case, self.index = case, index
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] as it came."""
        output: Tensor = _Sleep.apply(values, self.weight, self, context)  # type: ignore[no-untyped-call]
        return output

    def rest(self, context: SliceContext, times: float) -> None:
        """Sleeps ``times`` as long as a forward takes."""
        assert isinstance(context, SlicedContext)
        port, index, times = context.port, context.index, times * self.pace
        if port is None:
            _sleep(times * (self.case.linear_s + self.case.seconds(index)))
        elif port.share > 0:
            self._give(port, index, times)
        else:
            self._help(port, index, times)

    def _give(self, port: Port, index: int, times: float) -> None:
        port.send([torch.zeros(1)])
        answer = port.receive([MESSAGE])
        _sleep(times * (self.case.linear_s + self.case.seconds(index, port.share)))
        answer.wait()

    def _help(self, port: Port, index: int, times: float) -> None:
        asked = port.receive([MESSAGE])
        _sleep(times * (self.case.linear_s + self.case.seconds(index)))
        asked.wait()
        _sleep(times * self.case.moved(port.partner_slice, -port.share))
        port.send([torch.zeros(1)])


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, layer: Sleeper, context: SliceContext) -> Tensor:
        ctx.layer, ctx.context = layer, context
        layer.rest(context, 1)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.layer.rest(ctx.context, 2)
        return gradient.clone(), torch.ones(1), None, None


def _sleep(seconds: float) -> None:
    """As exactly as the clock allows: what the system sleeps too long is not slept the next time."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(left)


@dataclass
class Diary:
    """An observer of one step; times are of a clock that all processes of a machine share.

    Attributes:
        busy: seconds in compute operations, waits for messages taken off.
        begin, end: of the first and of the last operation.
    """

    clock: Clock
    busy: float = 0.0
    begin: float = math.inf
    end: float = 0.0
    _started: tuple[float, float] = (0.0, 0.0)

    def before(self, op: Op) -> None:
        """An operation begins."""
        self._started = time.monotonic(), self.clock.waited
        self.begin = min(self.begin, self._started[0])

    def after(self, op: Op) -> None:
        """An operation is over."""
        self.end = time.monotonic()
        if op.kind in COMPUTE:
            self.busy += self.end - self._started[0] - (self.clock.waited - self._started[1])


@dataclass(frozen=True)
class Found:
    """What a case showed: measured and simulated bubble, time lost over ideal time."""

    bubble: float
    simulated: float


def run_case(case: Case, steps: int = 3) -> Found:
    """The best of ``steps`` steps after a warm-up: whatever else the machine does only adds."""
    ranks = run_ranks(case.stages, _rank, case, steps, timeout_s=240)
    bubbles = []
    for turn in range(steps):
        diaries = [one[turn] for one in ranks]
        makespan = max(diary.end for diary in diaries) - min(diary.begin for diary in diaries)
        bubbles.append(makespan / statistics.mean(diary.busy for diary in diaries) - 1)
    costs = Costs.uniform(case.slices, attention=case.attention)
    return Found(min(bubbles), simulate(case.schedule(), costs).bubble)


def _rank(rank: int, world: int, case: Case, steps: int) -> list[Diary]:
    """What this rank did, by step."""
    schedule, clock = case.schedule(), Clock()
    sleepers = [Sleeper(case, schedule.shape.stage(rank, chunk)) for chunk in range(case.chunks)]
    head = SoftmaxHead(nn.Parameter(torch.ones(2, 1)), 0, 2) if rank == world - 1 else None
    parts = RankParts(
        [StageModule(None, [one], None) for one in sleepers],
        None,
        head,
        width=1,
        layers=case.stages * case.chunks,
        vocabulary=2,
    )
    timeout = timedelta(seconds=60)
    groups = make_groups(schedule, [range(world)], timeout)
    runtime = PipelineRuntime(schedule, parts, groups, RuntimeOptions(timeout))
    layout = Layout(even_bounds(case.slices, case.slices))
    ones, zeros = torch.ones(1, case.slices), torch.zeros(1, case.slices, dtype=torch.int64)
    microbatches = [Microbatch(layout, ones.unsqueeze(2), zeros, ones) for _ in range(case.microbatches)]
    found = []
    with clock.watching():
        for turn in range(steps + 1):
            for sleeper in sleepers:
                sleeper.pace = min(turn, 1)
            diary = Diary(clock)
            runtime.observer = diary
            dist.barrier()
            runtime.step(microbatches, step=turn)
            found.append(diary)
    return found[1:]


def uniform(stages: int, quick: bool) -> Case:
    """Slices of equal cost: 4 on two ranks, 8 on four."""
    return Case(stages, 2, 2, 2 * stages, linear_s=0.05 if quick else 0.1)


def unequal(exchange: bool, quick: bool) -> Case:
    """Four ranks, attention three times everything else."""
    return Case(4, 1, 4, 16, linear_s=0.004 if quick else 0.012, attention=3.0, exchange=exchange)


def main(chosen: measure.Options) -> dict[str, Any]:
    """Two and four ranks of equal slices, four of unequal ones with and without an exchange."""
    made = {f"uniform_p{p}": uniform(p, chosen.quick) for p in (2, 4)}
    made |= {name: unequal(name == "exchanged", chosen.quick) for name in ("unequal", "exchanged")}
    found = {name: run_case(case) for name, case in made.items()}
    rows = [[name, found[name].bubble, found[name].simulated, made[name].floor] for name in made]
    measure.show("Bubbles, time lost over ideal time", ["", "measured", "simulated", "(p-1)/(n v m)"], rows)
    results: dict[str, Any] = {name: {"bubble": one.bubble, "simulated": one.simulated} for name, one in found.items()}
    results["off_formula"] = max(abs(found[f"uniform_p{p}"].bubble / made[f"uniform_p{p}"].floor - 1) for p in (2, 4))
    results["imbalance_gone"] = imbalance_gone(found["unequal"], found["exchanged"], made["unequal"].floor)
    return results


def imbalance_gone(before: Found, after: Found, floor: float) -> float:
    """Share of the bubble above ``floor`` that an exchange takes away."""
    excess = before.bubble - floor
    return (before.bubble - after.bubble) / excess if excess > 0 else math.nan
