"""Predicted training of Llama 70B on clusters, beside what the paper of SlimPipe (arXiv 2504.14519) claims."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from types import MappingProxyType

from thresher.errors import ConfigError, nearest
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.simulate.autotune import exchange_rule
from thresher.pipeline.simulate.cluster import (
    LLAMA_70B,
    Gpu,
    Run,
    Transformer,
    costs_of,
    footprint_of,
    synchronisation_s,
    wire_of,
)
from thresher.pipeline.simulate.memory import predict_memory
from thresher.pipeline.simulate.simulator import simulate


@dataclass(frozen=True)
class Forecast:
    """What a run would do.

    Attributes:
        run: its layout.
        step_s: seconds of a step.
        mfu: operations the model needs over what all GPUs could do in that time.
        bubble: of ideal time.
        peak_bytes: of the GPU that holds most.
    """

    run: Run
    step_s: float
    mfu: float
    bubble: float
    peak_bytes: float


@dataclass(frozen=True)
class Scene:
    """A cluster and a context length, with the paper's settings for it and its claim.

    Attributes:
        slimpipe: as the authors ran it.
        claim: what the paper says.
    """

    slimpipe: Run
    claim: str


SCENES: Mapping[str, Scene] = MappingProxyType(
    {
        "h100-128": Scene(
            Run("slimpipe", 128, 512 * 1024, 8, 4, 2, 16, 5, 32, "partial", exchange=True),
            "1.57 times the MFU of the best baseline (Llama 70B, 512K)",
        ),
        "h100-256": Scene(
            Run("slimpipe", 256, 2048 * 1024, 8, 4, 4, 16, 5, 64, "partial", 0.75, exchange=True),
            "more than 45 % MFU (Llama 70B, 2048K); baselines fall behind or run out of memory",
        ),
    }
)


def forecast(model: Transformer, gpu: Gpu, run: Run) -> Forecast:
    """Simulates one step of ``run``.

    Raises:
        ScheduleError: there is no such schedule.
    """
    costs, wire = costs_of(model, gpu, run), wire_of(gpu)
    schedule = build_schedule(
        *(run.stages, run.chunks, run.microbatches, run.slices),
        policy=run.policy,
        split_head=run.split_head,
        work=costs.work(run.stages),
        exchange=exchange_rule(costs, 0, wire) if run.exchange else None,
    )
    timeline = simulate(schedule, costs, wire)
    memory = predict_memory(timeline, costs, footprint_of(model, run))
    step = timeline.makespan + synchronisation_s(model, gpu, run)
    mfu = model.step_flops(run.tokens, run.sequences) / (step * run.gpus * gpu.peak_flops)
    return Forecast(run, step, mfu, timeline.bubble, memory.worst)


def baselines(model: Transformer, like: Run) -> Iterator[Run]:
    """1F1B and interleaved 1F1B in every layout of the same cluster, with every kind of recomputation."""
    powers = (1, 2, 4, 8, 16, 32)
    for tensor, context, stages, recompute in product((4, 8), powers, powers, ("none", "partial", "full")):
        replicas, rest = divmod(like.gpus, tensor * context * stages)
        if rest or not replicas or like.sequences % replicas or model.layers % stages:
            continue
        deepest = model.layers // stages
        plain = Run("1f1b", like.gpus, like.tokens, like.sequences, tensor, context, stages, recompute=recompute)
        yield plain
        for chunks in (2, deepest):
            if stages > 1 and deepest % chunks == 0 and plain.microbatches % stages == 0:
                yield replace(plain, policy="interleaved", chunks=chunks)


def fitting(model: Transformer, gpu: Gpu, runs: Iterable[Run]) -> list[Forecast]:
    """Forecasts of the runs that fit into memory, fastest first."""
    tried = [forecast(model, gpu, run) for run in runs]
    return sorted((one for one in tried if one.peak_bytes <= gpu.usable_bytes), key=lambda one: one.step_s)


def report(name: str) -> str:
    """:func:`compare` on the scene ``name``, for Llama 70B.

    Raises:
        ConfigError: there is no such scene.
    """
    if name not in SCENES:
        raise ConfigError(f"no cluster '{name}'", where="--cluster", fix=nearest(name, SCENES))
    return compare(SCENES[name], LLAMA_70B, Gpu())


def compare(scene: Scene, model: Transformer, gpu: Gpu) -> str:
    """A table in Markdown: SlimPipe in the authors' settings, the best baselines, the claim, and all assumptions.

    Baselines with wide context parallelism profit most from the assumption that its communication is hidden, so the
    best one without more of it than SlimPipe has is shown as well.
    """
    ours, own = scene.slimpipe, scene.slimpipe.context
    rivals = fitting(model, gpu, baselines(model, ours))
    rows = [
        ("SlimPipe", forecast(model, gpu, ours)),
        ("SlimPipe, no exchange", forecast(model, gpu, replace(ours, exchange=False))),
        ("best 1F1B", next((one for one in rivals if one.run.policy == "1f1b"), None)),
        ("best interleaved", next((one for one in rivals if one.run.policy == "interleaved"), None)),
        (f"best of both with c <= {own}", next((one for one in rivals if one.run.context <= own), None)),
    ]
    return "\n".join([*_table(rows), "", f"The paper: {scene.claim}.", "", *_assumptions(gpu)])


def _table(rows: list[tuple[str, Forecast | None]]) -> Iterator[str]:
    yield "| schedule | t, c, d, p | n, v | recompute | bubble | step s | MFU | GiB | to the fastest baseline |"
    yield "|---|---|---|---|---|---|---|---|---|"
    rivals = [row.step_s for name, row in rows if row and row.run.policy != "slimpipe"]
    for name, row in rows:
        yield _row(name, row, min(rivals, default=None))


def _row(name: str, row: Forecast | None, rival: float | None) -> str:
    if row is None:
        return f"| {name} | nothing fits | | | | | | | |"
    run = row.run
    kept = f"{run.recompute}, {run.offload:.0%} offloaded" if run.offload else run.recompute
    gain = f"{rival / row.step_s:.2f}" if rival else "-"
    return (
        f"| {name} | {run.tensor}, {run.context}, {run.replicas}, {run.stages} | {run.slices}, {run.chunks} | {kept} | "
        f"{row.bubble:.1%} | {row.step_s:.1f} | {row.mfu:.1%} | {row.peak_bytes / 2**30:.1f} | {gain} |"
    )


def _assumptions(gpu: Gpu) -> Iterator[str]:
    yield f"Assumed of each GPU: {', '.join(f'{it.name} {getattr(gpu, it.name):.4g}' for it in fields(gpu))}."
