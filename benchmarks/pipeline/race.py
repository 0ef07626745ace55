"""Runs contestants in turn on persistent ranks, and keeps every reading in a file, so that a run can be taken up again.

One process per rank, one thread each, all contestants in each: A B C A B C ... A reading that was disturbed (see
:mod:`clocks`) is taken again at once, at most :data:`ATTEMPTS` times; a round ends when all had their turn. Readings of
a file are used again only for the same race and the same sources.
"""

import gc
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

import thresher.pipeline
from benchmarks.pipeline.clocks import Clock, Reading, is_clean
from benchmarks.pipeline.contestants import Contestant, Entry, build
from benchmarks.pipeline.model import Size, batch
from tests.multi.harness import run_ranks
from thresher.pipeline.schedule.ops import Kind

ATTEMPTS = 3


@dataclass(frozen=True)
class Race:
    """Who runs against whom.

    Attributes:
        world: ranks.
        entries: contestants; the first is the one that gradients are compared with.
        rounds: in which every contestant is to have a clean reading.
        limit_s: after which no new round begins.
        samples: file of readings.
        code: see :func:`code`.
    """

    size: Size
    world: int
    microbatches: int
    entries: tuple[Entry, ...]
    rounds: int
    limit_s: float
    samples: Path
    code: str

    @property
    def key(self) -> str:
        """What readings must have in common with this race to count."""
        facts = repr((self.size, self.world, self.microbatches, self.entries, self.code))
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def code() -> str:
    """A hash of the sources that are measured."""
    folders = (Path(__file__).parent, Path(thresher.pipeline.__file__).parent)
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.blake2b(b"".join(path.read_bytes() for path in files), digest_size=8).hexdigest()


Times = dict[tuple[Kind, int, int], float]
"""Thread-CPU seconds by (kind, stage, slice): the median over microbatches."""


@dataclass(frozen=True)
class Turn:
    """A contestant's reading in one round.

    Attributes:
        ranks: readings of those that take part.
        times: of operations, all ranks together; empty where the contestant has no operations.
    """

    ranks: list[Reading]
    times: Times

    @property
    def wall(self) -> float:
        """Seconds until the slowest rank was done."""
        return max(reading.wall for reading in self.ranks)

    @property
    def clean(self) -> bool:
        """Whether no rank was disturbed."""
        return is_clean(self.ranks)


@dataclass
class Found:
    """What a race has shown so far.

    Attributes:
        rounds: turns by contestant.
        agreement: by contestant, largest differences of "loss" and "gradients" from the first, relative.
    """

    rounds: list[dict[str, Turn]] = field(default_factory=list)
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)

    def clean(self, *names: str) -> list[list[Turn]]:
        """The turns of contestants in rounds in which all of them were clean."""
        turns = ([one.get(name) for name in names] for one in self.rounds)
        return [[turn for turn in found if turn] for found in turns if all(turn and turn.clean for turn in found)]

    def ratio(self, slower: str, faster: str, of: Callable[[Turn], float] = lambda turn: turn.wall) -> float:
        """Median over clean rounds of how many times as long ``slower`` takes; NaN without a clean round."""
        pairs = self.clean(slower, faster)
        return statistics.median(of(a) / of(b) for a, b in pairs) if pairs else float("nan")


def hold(race: Race) -> Found:
    """Runs what is missing of a race, and returns all there is."""
    race.samples.parent.mkdir(parents=True, exist_ok=True)
    known = load(race)
    if not known.agreement or not _is_enough(race, known):
        run_ranks(race.world, _rank, race, os.getpid(), timeout_s=race.limit_s + 900)
    return load(race)


def load(race: Race) -> Found:
    """Readings of this race in its file; a last line cut short by a kill is passed over."""
    found, turns = Found(), dict[str, dict[str, Turn]]()
    lines = race.samples.read_text(encoding="utf-8").splitlines() if race.samples.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["key"] != race.key:
            continue
        if "agreement" in entry:
            found.agreement = entry["agreement"]
        else:
            turns.setdefault(entry["round"], {})[entry["name"]] = _turn(entry)
    found.rounds = list(turns.values())
    return found


def _turn(entry: dict[str, Any]) -> Turn:
    times = {(Kind(kind), stage, index): seconds for kind, stage, index, seconds in entry["times"]}
    return Turn([Reading(*reading) for reading in entry["ranks"]], times)


def _is_enough(race: Race, found: Found) -> bool:
    complete = [one for one in found.rounds if len(one) == len(race.entries)]
    clean = [min(len(found.clean(entry.name)), len(complete)) for entry in race.entries]
    return min(clean) >= race.rounds


def _rank(rank: int, world: int, race: Race, owner: int) -> None:
    racers = {e.name: build(e, race.size, rank, world, race.microbatches) for e in race.entries}
    clock, start = Clock(), time.time()
    with clock.watching():
        _agree(racers, race, rank, world)
        ends = time.monotonic() + race.limit_s
        for number in count():
            if not _agreed(time.monotonic() < ends and not _is_enough(race, load(race))):
                return
            for name, racer in racers.items():
                if not _agreed(_lives(owner)):
                    return  # whoever wanted the readings was killed
                _take(name, racer, race, clock, f"{start:.0f}-{number}", rank, world)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _agreed(goes_on: bool) -> bool:
    """What rank 0 says. Collective."""
    said = [goes_on]
    dist.broadcast_object_list(said, 0)
    return said[0]


def _agree(racers: dict[str, Contestant], race: Race, rank: int, world: int) -> None:
    """The warm-up, which compares all losses and gradients with those of the first contestant."""
    found = {name: _gradients(racer, race, world) for name, racer in racers.items()}
    loss, gradients = found[race.entries[0].name]
    agreement = {
        name: {
            "loss": abs(theirs / loss - 1),
            "gradients": max(_difference(other[key], gradient) for key, gradient in gradients.items()),
        }
        for name, (theirs, other) in found.items()
    }
    _write(race, {"agreement": agreement}, rank)


def _gradients(racer: Contestant, race: Race, world: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model: what ranks have of it, added up."""
    racer.zero()
    loss = racer.step(batch(race.size, race.microbatches, 0))
    mine = {key: p.grad for key, p in racer.parameters().items() if p.grad is not None}
    answers: list[tuple[float | None, dict[str, Tensor]] | None] = [None] * world
    dist.all_gather_object(answers, (loss, mine))
    racer.zero()
    total, gradients = 0.0, dict[str, Tensor]()
    for answer in answers:
        assert answer is not None
        total += answer[0] or 0.0
        for key, gradient in answer[1].items():
            gradients[key] = gradients[key] + gradient if key in gradients else gradient
    return total, gradients


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _take(name: str, racer: Contestant, race: Race, clock: Clock, number: str, rank: int, world: int) -> None:
    for attempt in range(ATTEMPTS):
        mine: list[Reading] = []
        racer.zero()
        microbatches = batch(race.size, race.microbatches, attempt)
        gc.collect()
        dist.barrier()
        with clock.reading(mine):
            racer.step(microbatches)
        all_ranks: list[tuple[list[Reading], Any] | None] = [None] * world
        dist.all_gather_object(all_ranks, (mine if racer.takes_part() else [], racer.times.seconds))
        racer.zero()
        answers = [one for one in all_ranks if one is not None]
        readings = [reading for one, _ in answers for reading in one]
        if is_clean(readings) or attempt == ATTEMPTS - 1:
            break
    times = [[*key, statistics.median(found)] for _, seconds in answers for key, found in seconds.items()]
    ranks = [[r.wall, r.cpu, r.wait] for r in readings]
    _write(race, {"round": number, "name": name, "ranks": ranks, "times": times}, rank)


def _write(race: Race, entry: dict[str, Any], rank: int) -> None:
    if rank == 0:
        with race.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": race.key, **entry}) + "\n")
