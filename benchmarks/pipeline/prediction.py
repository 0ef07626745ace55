"""Steps as the simulator predicts them from a calibration on one rank, beside measured ones of two ranks.

The calibration runs the model in a pipeline of one rank, cut into 4 and into 8 slices, and fits seconds per layer as
fixed + per token + per pair to the thread-CPU times of its operations. The line between two ranks is timed by a ping
of 64 bytes and of a megabyte. No measurement of the predicted steps enters.
"""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure
from benchmarks.pipeline.contestants import Entry, Ours
from benchmarks.pipeline.model import Size, batch
from benchmarks.pipeline.race import Found, Race, code, hold
from benchmarks.pipeline.speed import uneven_bounds
from tests.multi.harness import run_ranks
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.runtime.stage import layer_ranges
from thresher.pipeline.schedule.ops import Kind
from thresher.pipeline.simulate.costs import Costs, Sample, Term, Traffic
from thresher.pipeline.simulate.link import Link
from thresher.pipeline.simulate.simulator import simulate

CALIBRATION = (4, 8)
MEGABYTE = 1 << 20


def races(quick: bool, samples: Path, limit_s: float) -> list[Race]:
    """Six settings: four of two microbatches, two of four."""
    tokens = 2048 if quick else 8192
    uneven = uneven_bounds(tokens, 6)
    two = {"n4 v1": (1, even_bounds(tokens, 4)), "n8 v1": (1, even_bounds(tokens, 8))}
    two |= {"n8 v2": (2, even_bounds(tokens, 8)), "n6 v2 uneven": (2, uneven)}
    four = {"n4 v2 m4": (2, even_bounds(tokens, 4)), "n8 v2 m4": (2, even_bounds(tokens, 8))}
    rounds = 1 if quick else 5
    return [
        Race(
            Size(tokens=tokens),
            2,
            microbatches,
            tuple(Entry(name, "ours", chunks, bounds) for name, (chunks, bounds) in made.items()),
            rounds,
            limit_s / 2,
            samples,
            code(),
        )
        for microbatches, made in ((2, two), (4, four))
    ]


def calibrate(size: Size, steps: int) -> dict[Kind, list[Sample]]:
    """Samples of single layers, and of the loss."""
    torch.set_num_threads(1)
    found: dict[Kind, list[Sample]] = {}
    for slices in CALIBRATION:
        racer = Ours(size, 0, 1, 1, Entry("", "ours", 1, even_bounds(size.tokens, slices)))
        shape = Costs(racer.bounds, Term(), Term())
        taken: dict[tuple[Kind, int, int], list[float]] = {}
        for turn in range(steps + 1):
            racer.zero()
            racer.step(batch(size, 1, 0))
            for key, seconds in racer.times.seconds.items() if turn else ():
                taken.setdefault(key, []).extend(seconds)
        for (kind, _, index), seconds in taken.items():
            layers = 1 if kind is Kind.LOSS else size.layers
            sample = Sample(shape.tokens(index), shape.pairs(index), statistics.median(seconds) / layers)
            found.setdefault(kind, []).append(sample)
    return found


def line() -> Link:
    """The line between two ranks."""
    small, large = run_ranks(2, _ping, timeout_s=120)[0]
    return Link(small, MEGABYTE / max(large - small, 1e-9))


def _ping(rank: int, world: int) -> tuple[float, float]:
    """Seconds one way of 64 bytes and of a megabyte: half the median of there and back."""
    found = []
    for size in (64, MEGABYTE):
        tensor, turns = torch.zeros(size, dtype=torch.uint8), list[float]()
        for _ in range(30):
            start = time.perf_counter()
            for source in (0, 1):
                (dist.send if rank == source else dist.recv)(tensor, 1 - rank)
            turns.append(time.perf_counter() - start)
        found.append(statistics.median(turns) / 2)
    return found[0], found[1]


def predict(race: Race, entry: Entry, samples: Mapping[Kind, list[Sample]], wire: Link) -> float:
    """Seconds of a step."""
    layers = tuple(len(r) for r in layer_ranges(race.size.layers, race.world * entry.chunks))
    costs = Costs.fit(entry.bounds, samples, layers=layers)
    costs = replace(costs, traffic=Traffic(hidden=4.0 * race.size.width))
    return simulate(entry.schedule(race.world, race.microbatches), costs, wire).makespan


def main(chosen: measure.Options, samples: Path, limit_s: float) -> dict[str, Any]:
    """Calibrates, predicts, runs what is missing, prints the table and returns the figures."""
    made = races(chosen.quick, samples, limit_s)
    calibration, wire = calibrate(made[0].size, 1 if chosen.quick else 3), line()
    settings: dict[str, dict[str, float]] = {}
    for race in made:
        predicted = {entry.name: predict(race, entry, calibration, wire) for entry in race.entries}
        found = hold(race)
        settings |= {name: _beside(seconds, name, found) for name, seconds in predicted.items()}
    rows = [[name, one["predicted_s"], one["measured_s"], one["off"], one["clean"]] for name, one in settings.items()]
    measure.show("A step, seconds", ["", "predicted", "measured", "off", "clean"], rows)
    worst = max(one["off"] for one in settings.values())
    return {"settings": settings, "worst_off": worst, "latency_s": wire.latency_s, "bytes_per_s": wire.bytes_per_s}


def _beside(predicted: float, name: str, found: Found) -> dict[str, float]:
    turns = [turn for (turn,) in found.clean(name)]
    measured = statistics.median(turn.wall for turn in turns) if turns else math.nan
    return {
        "predicted_s": predicted,
        "measured_s": measured,
        "off": abs(predicted / measured - 1),
        "clean": float(len(turns)),
    }
