"""Chooses chunks, slices, slack and exchange: the fastest that fit a budget of bytes, by simulation.

Rules of thumb of SlimPipe's authors, which the search confirms or corrects: as many chunks as there are layers per
rank, a number of slices that is a multiple of the number of ranks, slices no shorter than kernels like them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.ops import Shape
from thresher.pipeline.simulate.costs import Costs, even_layers
from thresher.pipeline.simulate.link import INSTANT, Wire
from thresher.pipeline.simulate.memory import Footprint, predict_memory, slimpipe_bytes
from thresher.pipeline.simulate.simulator import simulate

NO_EXCHANGE = -1


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        stages: ranks of the pipeline, p.
        layers: of the model, L >= p.
        microbatches: per step, m.
        tokens: per row of a microbatch, S.
        costs: per layer and token; its bounds and layers are replaced by those of each candidate.
        footprint: bytes per token, and those that are no token's.
        wire: between ranks.
        split_head, split_embedding: as in :class:`~thresher.pipeline.schedule.ops.Shape`.
    """

    stages: int
    layers: int
    microbatches: int
    tokens: int
    costs: Costs
    footprint: Footprint
    wire: Wire = INSTANT
    split_head: bool = False
    split_embedding: bool = False

    def at(self, chunks: int, slices: int) -> Costs:
        """Costs of equal slices and chunks."""
        edges = tuple(self.tokens * i // slices for i in range(slices + 1))
        return replace(self.costs, bounds=edges, layers=even_layers(self.layers, self.stages * chunks))

    @property
    def microbatch_bytes(self) -> float:
        """M_a."""
        return self.footprint.microbatch_bytes(self.costs.batch * self.tokens, self.layers)


@dataclass(frozen=True)
class Limits:
    """What to search.

    Attributes:
        slice_tokens: fewest tokens of a slice; kernels and the host lose time below some hundred.
        chunks: to try; all from 1 to L / p where it is empty.
        slices_per_stage: most slices, in multiples of p.
        slacks: to try.
        exchanges: limits to try besides no exchange; 0 is as many slices as pay.
        finalists: settings with which exchanges are tried: the fastest that fit without.
        operations: most forwards and backwards of a schedule that is worth simulating.
    """

    slice_tokens: int = 256
    chunks: tuple[int, ...] = ()
    slices_per_stage: int = 16
    slacks: tuple[int, ...] = (1, 2)
    exchanges: tuple[int, ...] = (0, 2)
    finalists: int = 4
    operations: int = 40_000


@dataclass(frozen=True)
class Setting:
    """Something to try.

    Attributes:
        chunks: v.
        slices: n.
        slack: w.
        exchange: most slices an operation shares; -1 for no exchange, 0 for as many as pay.
    """

    chunks: int
    slices: int
    slack: int
    exchange: int

    def __str__(self) -> str:
        shared = {NO_EXCHANGE: "off", 0: "unlimited"}.get(self.exchange, str(self.exchange))
        return f"chunks {self.chunks}, slices {self.slices}, slack {self.slack}, exchange {shared}"


@dataclass(frozen=True)
class Candidate:
    """A setting that fits.

    Attributes:
        setting: what it is.
        step_s: predicted seconds of a step.
        bubble: of ideal time.
        peak_bytes: of the rank that holds most.
    """

    setting: Setting
    step_s: float
    bubble: float
    peak_bytes: float


@dataclass(frozen=True)
class Choice:
    """The outcome of a search.

    Attributes:
        ranked: what fits, fastest first; of equally fast ones the smallest, then the one with fewest slices.
        excluded: the others, and why.
    """

    ranked: tuple[Candidate, ...]
    excluded: tuple[tuple[Setting, str], ...]

    @property
    def best(self) -> Candidate:
        """The fastest that fits."""
        return self.ranked[0]


def autotune(memory_budget_bytes: float, job: Job, limits: Limits | None = None) -> Choice:
    """Simulates the settings within ``limits`` and ranks those that fit.

    Args:
        memory_budget_bytes: of one rank, for everything in :class:`~thresher.pipeline.simulate.memory.Holding`.
        job: what is to be trained.
        limits: what to search; None for the defaults.

    Raises:
        ScheduleError: fewer layers than stages, slices too long for the sequence, or nothing fits.
    """
    search = _Search(job, limits or Limits(), memory_budget_bytes)
    settings = list(_settings(job, search.limits))
    for setting in settings:
        if setting.exchange == NO_EXCHANGE:
            search.consider(setting)
    finalists = {(it.chunks, it.slices, it.slack) for it in search.best(search.limits.finalists)}
    for setting in settings:
        if setting.exchange == NO_EXCHANGE:
            continue
        if (setting.chunks, setting.slices, setting.slack) in finalists:
            search.consider(setting)
        else:
            search.excluded.append((setting, "not among the fastest that fit without exchange"))
    if not search.fitting:
        raise _nothing_fits(memory_budget_bytes, job, settings)
    return Choice(tuple(sorted(search.fitting, key=_order)), tuple(search.excluded))


class _Search:
    """What has been tried so far."""

    def __init__(self, job: Job, limits: Limits, budget: float) -> None:
        self.job, self.limits, self.budget = job, limits, budget
        self.fitting: list[Candidate] = []
        self.excluded: list[tuple[Setting, str]] = []

    def consider(self, setting: Setting) -> None:
        reason = _not_worth(self.job, setting, self.limits, self.budget)
        if not reason:
            candidate = predict(self.job, setting)
            if candidate.peak_bytes <= self.budget:
                self.fitting.append(candidate)
                return
            reason = f"needs {_gib(candidate.peak_bytes)}"
        self.excluded.append((setting, reason))

    def best(self, count: int) -> list[Setting]:
        return [candidate.setting for candidate in sorted(self.fitting, key=_order)[:count]]


def predict(job: Job, setting: Setting) -> Candidate:
    """What ``setting`` makes of ``job``.

    Raises:
        ScheduleError: there is no such schedule.
    """
    costs = job.at(setting.chunks, setting.slices)
    schedule = build_schedule(
        *(job.stages, setting.chunks, job.microbatches, setting.slices, setting.slack),
        split_head=job.split_head,
        split_embedding=job.split_embedding,
        work=costs.work(job.stages),
        exchange=None if setting.exchange == NO_EXCHANGE else exchange_rule(costs, setting.exchange, job.wire),
    )
    timeline = simulate(schedule, costs, job.wire)
    memory = predict_memory(timeline, costs, job.footprint)
    return Candidate(setting, timeline.makespan, timeline.bubble, memory.worst)


def exchange_rule(costs: Costs, limit: int, wire: Wire) -> ExchangeRule:
    """The rule for sharing attention that follows from costs and lines.

    Args:
        costs: of operations and sizes of messages; forward terms count.
        limit: most slices an operation shares; 0 for as many as pay.
        wire: the line between ranks 0 and 1 counts.
    """
    slices = len(costs.bounds) - 1
    tokens = costs.batch * costs.bounds[-1] / slices
    linear = costs.forward.seconds(tokens, 0)
    latency = wire.seconds(0, 1, 0)
    size = costs.traffic.key_value * tokens
    return ExchangeRule(
        limit=limit,
        transfer=(wire.seconds(0, 1, size) - latency) / linear,
        latency=2 * latency / linear,
    )


def _order(candidate: Candidate) -> tuple[float, float, int, int]:
    setting = candidate.setting
    return candidate.step_s, candidate.peak_bytes, setting.slices, setting.exchange


def _settings(job: Job, limits: Limits) -> Iterator[Setting]:
    deepest = job.layers // job.stages
    if deepest < 1:
        raise ScheduleError(
            f"{job.layers} layers are too few for {job.stages} stages",
            where="autotune",
            fix=f"use at most {job.layers} stages",
        )
    most = min(job.tokens // limits.slice_tokens, limits.slices_per_stage * job.stages) // job.stages
    if most < 1:
        raise ScheduleError(
            f"{job.tokens} tokens are too few for {job.stages} slices of {limits.slice_tokens}",
            where="autotune",
            fix=f"use at most {job.tokens // limits.slice_tokens} stages, or allow shorter slices",
        )
    chunks: Sequence[int] = limits.chunks or range(1, deepest + 1)
    slices = [job.stages * times for times in range(1, most + 1)]
    for setting in product(
        [v for v in chunks if v <= deepest], slices, limits.slacks, (NO_EXCHANGE, *limits.exchanges)
    ):
        yield Setting(*setting)


def _not_worth(job: Job, setting: Setting, limits: Limits, budget: float) -> str:
    """Why ``setting`` need not be simulated; empty where it must be."""
    if setting.exchange != NO_EXCHANGE and job.stages == 1:
        return "one rank has no peer to share with"
    operations = 2 * job.stages * setting.chunks * setting.slices * job.microbatches
    if operations > limits.operations:
        return f"{operations} operations are more than {limits.operations}"
    floor = _floor(job, setting)
    return f"needs more than {_gib(floor)}" if floor > budget else ""


def _floor(job: Job, setting: Setting) -> float:
    """Bytes that rank 0 needs at least."""
    shape = Shape(job.stages, setting.chunks, job.microbatches, setting.slices, setting.slack)
    everything = job.microbatches * job.microbatch_bytes / job.stages
    return job.footprint.states + min(slimpipe_bytes(job.microbatch_bytes, shape, 0), everything)


def _nothing_fits(budget: float, job: Job, settings: Sequence[Setting]) -> ScheduleError:
    quiet = [setting for setting in settings if setting.exchange == NO_EXCHANGE]
    smallest = predict(job, min(quiet, key=lambda setting: (_floor(job, setting), setting.chunks)))
    return ScheduleError(
        f"no setting fits into {_gib(budget)}; the smallest needs {_gib(smallest.peak_bytes)}: {smallest.setting}",
        where="autotune",
        fix="use more stages, shorter sequences, recomputation or offload, or a larger budget",
    )


def _gib(size_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} GiB"
