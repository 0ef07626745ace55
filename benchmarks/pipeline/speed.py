"""How fast a step is: ours beside torch's schedules, two independent processes, and the plain model.

Walls count only where no rank was disturbed (:mod:`clocks`); ratios are of the same round. Beside them stand ratios of
replays: the length of the step as our simulator finds it from the thread-CPU time that each operation took in that
round, which a busy machine stretches far less. The replay of torch's 1F1B and interleaved 1F1B runs the same order of
work as our builder has it, with free messages.
"""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.pipeline.clocks import CLEAN
from benchmarks.pipeline.contestants import Entry, build
from benchmarks.pipeline.model import Size, batch
from benchmarks.pipeline.race import Found, Race, Turn, code, hold
from tests.multi.harness import run_ranks
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.simulate.costs import Costs, Term, balanced_bounds
from thresher.pipeline.simulate.simulator import simulate

OURS, UNEVEN = "ours n8 v2", "ours n6 v2 uneven"
INTERLEAVED = ("interleaved v2", "interleaved v2 deferred")
STEPS = 5


def entries(tokens: int, quick: bool) -> tuple[Entry, ...]:
    """Who runs; slices of 1,024 tokens of 8,192, or longer first."""
    slices = 4 if quick else 8
    uneven = uneven_bounds(tokens, 3 if quick else 6)
    return (
        Entry("plain", "plain"),
        Entry("independent", "independent"),
        Entry("1f1b", "1f1b"),
        Entry(INTERLEAVED[0], "interleaved", 2),
        Entry(INTERLEAVED[1], "interleaved", 2, defer=True),
        Entry(OURS, "ours", 2, even_bounds(tokens, slices)),
        Entry(UNEVEN, "ours", 2, uneven),
    )


def uneven_bounds(tokens: int, slices: int) -> tuple[int, ...]:
    """Slices of equal cost, if attention of a whole sequence costs twice what everything else does."""
    return balanced_bounds(tokens, slices, Term(per_token=1.0, per_pair=4 / tokens), multiple=64)


def race(quick: bool, samples: Path, limit_s: float) -> Race:
    """Two ranks, two microbatches of 8,192 tokens (quick: 2,048)."""
    size = Size(tokens=2048 if quick else 8192)
    return Race(size, 2, 2, entries(size.tokens, quick), 2 if quick else 7, limit_s, samples, code())


def replayed(turn: Turn, entry: Entry, race: Race) -> float:
    """Seconds of the step as simulated from the CPU times of its operations; the slowest rank's CPU without any."""
    if not turn.times:
        return max(reading.cpu for reading in turn.ranks)
    bounds = entry.bounds or (0, race.size.tokens)
    free = Term()
    costs = Costs(bounds, free, free, measured=turn.times)
    return simulate(entry.schedule(race.world, race.microbatches), costs).makespan


def figures(race: Race, found: Found) -> dict[str, Any]:
    """Medians by contestant, and how many times faster ours is."""
    schedules = {entry.name: entry for entry in race.entries}
    one = {name: _contestant(name, schedules[name], race, found) for name in schedules}
    interleaved = min(INTERLEAVED, key=lambda name: _or_inf(one[name]["wall_s"]))
    ratios: dict[str, Any] = {}
    for name, ours in (("even", OURS), ("uneven", UNEVEN)):
        ratios[name] = {
            "over_1f1b": found.ratio("1f1b", ours),
            "over_interleaved": found.ratio(interleaved, ours),
            "efficiency": found.ratio("independent", ours),
            "of_plain_halved": found.ratio("plain", ours) / 2,
            "replay_over_1f1b": _replay_ratio("1f1b", ours, race, found),
            "replay_over_interleaved": min(_replay_ratio(other, ours, race, found) for other in INTERLEAVED),
            "replay_efficiency": _replay_ratio("independent", ours, race, found),
            "clean_rounds": len(found.clean("1f1b", interleaved, "independent", ours)),
        }
    agreement = {
        what: max(one[what] for one in found.agreement.values()) for what in ("loss", "gradients") if found.agreement
    }
    return {"contestants": one, "interleaved": interleaved, **ratios, "agreement": agreement}


def _contestant(name: str, entry: Entry, race: Race, found: Found) -> dict[str, float]:
    turns = [turn for (turn,) in found.clean(name)]
    every = [one[name] for one in found.rounds if name in one]
    return {
        "wall_s": _median([turn.wall for turn in turns]),
        "cpu_s": _median([max(r.cpu for r in turn.ranks) for turn in every]),
        "wait_s": _median([max(r.wait for r in turn.ranks) for turn in turns]),
        "replay_s": _median([replayed(turn, entry, race) for turn in every]),
        "any_wall_s": _median([turn.wall for turn in every]),
        "clean": float(len(turns)),
        "rounds": float(len(every)),
    }


def _replay_ratio(slower: str, faster: str, race: Race, found: Found) -> float:
    entries = {entry.name: entry for entry in race.entries}
    pairs = [(one[slower], one[faster]) for one in found.rounds if slower in one and faster in one]
    return _median([replayed(a, entries[slower], race) / replayed(b, entries[faster], race) for a, b in pairs])


def curves(entries: tuple[Entry, ...]) -> dict[str, list[float]]:
    """Losses of a few steps of SGD by contestant, on short sequences."""
    size = Size(tokens=512)
    racers = [replace(e, bounds=even_bounds(512, len(e.bounds) - 1)) if e.bounds else e for e in entries]
    found = run_ranks(2, _train, size, racers, timeout_s=600)
    return {name: [sum(one[name][step] for one in found) for step in range(STEPS)] for name in found[0]}


def _train(rank: int, world: int, size: Size, entries: list[Entry]) -> dict[str, list[float]]:
    """This rank's shares of the losses. Gradients of whole models on several ranks are those of one process."""
    losses: dict[str, list[float]] = {}
    for entry in entries:
        if entry.kind == "independent":
            continue
        racer = build(entry, size, rank, world, 2)
        optimizer = torch.optim.SGD(racer.parameters().values(), lr=0.5)
        losses[entry.name] = []
        for step in range(STEPS):
            racer.zero()
            losses[entry.name].append(racer.step(batch(size, 2, step)) or 0.0)
            optimizer.step()
    return losses


def main(chosen: measure.Options, samples: Path, limit_s: float) -> dict[str, Any]:
    """Runs what is missing, prints the table, returns the figures."""
    made = race(chosen.quick, samples, limit_s)
    found = figures(made, hold(made))
    shown = ("wall_s", "wait_s", "cpu_s", "replay_s", "any_wall_s", "clean", "rounds")
    rows = [[name, *(one[key] for key in shown)] for name, one in found["contestants"].items()]
    measure.show(f"A step, seconds; clean: other than CPU and waiting is below {CLEAN:.0%}", ["", *shown], rows)
    ratios = [[key, found["even"][key], found["uneven"][key]] for key in found["even"]]
    measure.show("Ours is so many times faster", ["", "even slices", "uneven slices"], ratios)
    found["losses"] = curves(made.entries)
    plain = found["losses"]["plain"]
    found["loss_difference"] = max(
        abs(a / b - 1) for losses in found["losses"].values() for a, b in zip(losses, plain, strict=True)
    )
    return found


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
