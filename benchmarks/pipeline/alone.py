"""A pipeline of one rank beside the plain model: what slicing itself costs, in thread-CPU time."""

from functools import partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.pipeline.contestants import Contestant, Entry, build
from benchmarks.pipeline.model import Size, batch
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.microbatch import Microbatch

SLICES = (1, 8)


def main(chosen: measure.Options) -> dict[str, Any]:
    """One microbatch of 8,192 tokens, in turns; prints the table and returns the figures."""
    torch.set_num_threads(1)
    size = Size(tokens=2048 if chosen.quick else 8192)
    entries = [Entry("plain", "plain")]
    entries += [Entry(f"n{n}", "ours", 1, even_bounds(size.tokens, n)) for n in SLICES]
    racers = {entry.name: build(entry, size, 0, 1, 1) for entry in entries}
    microbatches = batch(size, 1, 0)
    turns = {name: partial(_step, racer, microbatches) for name, racer in racers.items()}
    found = measure.interleaved(turns, 3 if chosen.quick else 9)
    results = {f"cost_n{n}": 1 / measure.ratio(found[f"n{n}"], found["plain"]) for n in SLICES}
    rows = [[name, one.median_s, one.spread, results.get(f"cost_{name}", 1.0)] for name, one in found.items()]
    measure.show("One rank: CPU seconds of a step", ["", "median", "spread", "over plain"], rows)
    return {**results, "median_s": {name: one.median_s for name, one in found.items()}}


def _step(racer: Contestant, microbatches: list[Microbatch]) -> None:
    racer.zero()
    racer.step(microbatches)
