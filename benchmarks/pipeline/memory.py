"""Bytes a rank keeps during a step: ours beside torch's 1F1B and interleaved 1F1B, same model, same run.

``saved`` is what autograd keeps, each storage once, without parameters, ids and receive buffers. ``receiving`` are
receive buffers: ours while a message is under way (what is received is saved from then on), torch's for the whole
step, since it allocates one for every microbatch. ``accumulators`` are gradients of keys and values that wait for the
backward of their slice; ``sending`` are outputs that are kept because they are being sent, or, with torch, until their
backward. All are shares of M_a: what autograd keeps of one microbatch in all layers of the plain model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.pipeline.contestants import Contestant, Entry, Ours, Torchs, build
from benchmarks.pipeline.model import Part, Size, batch
from benchmarks.pipeline.speed import uneven_bounds
from tests.multi.harness import run_ranks
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.meter import SavedBytes

TOKENS = 4096
"""Bytes are proportional to tokens."""
KINDS = ("saved", "receiving", "accumulators", "sending")


@dataclass(frozen=True)
class Case:
    """One step of one contestant."""

    size: Size
    world: int
    microbatches: int
    entry: Entry

    @property
    def slices(self) -> int:
        """Per microbatch."""
        return max(len(self.entry.bounds) - 1, 1)


def cases(quick: bool) -> list[Case]:
    """Two ranks with 4 layers and 8 slices, also 6 uneven ones; four with 8 layers and 16 slices; 2 chunks."""
    tokens = 1024 if quick else TOKENS
    two = [(2, 4, 8, m) for m in ((2, 4) if quick else (2, 4, 8))]
    four = [(4, 8, 16, m) for m in ((4,) if quick else (4, 8))]
    found = []
    for world, layers, slices, microbatches in two + four:
        size, bounds = Size(layers=layers, tokens=tokens), even_bounds(tokens, slices)
        racers: tuple[Entry, ...] = (
            Entry("1f1b", "1f1b"),
            Entry("interleaved", "interleaved", 2),
            Entry("ours", "ours", 2, bounds),
        )
        if world == 2:
            racers += (Entry("ours uneven", "ours", 2, uneven_bounds(tokens, 6)),)
        found += [Case(size, world, microbatches, entry) for entry in racers]
    return found


def run_case(case: Case) -> dict[str, Any]:
    """Shares of M_a by kind and rank, their sums, and what the formula says of ours."""
    ranks = run_ranks(case.world, _rank, case, timeout_s=900)
    whole = model_bytes(case.size)
    shares = [{kind: sizes.get(kind, 0) / whole for kind in KINDS} for sizes in ranks]
    chunk_slices = case.slices * case.entry.chunks
    formula = [(1 + 2 * (case.world - 1 - rank) / chunk_slices) / case.world for rank in range(case.world)]
    return {
        "ranks": shares,
        "model_bytes": whole,
        "total": max(share["saved"] + share["receiving"] for share in shares),
        "total_with_accumulators": max(share["saved"] + share["receiving"] + share["accumulators"] for share in shares),
        "off_formula": max(abs(share["saved"] / wanted - 1) for share, wanted in zip(shares, formula, strict=True))
        if case.entry.name == "ours"
        else None,
    }


def model_bytes(size: Size) -> int:
    """M_a, in bytes."""
    part = Part(size, range(size.layers))
    hidden = torch.zeros(1, size.tokens, size.width, requires_grad=True)
    with SavedBytes(part.parameters()) as meter:
        kept = part.trunk(hidden)
    assert kept.requires_grad
    return meter.live_bytes


def _rank(rank: int, world: int, case: Case) -> dict[str, int]:
    racer = build(case.entry, case.size, rank, world, case.microbatches)
    microbatches = batch(case.size, case.microbatches, 0)
    if isinstance(racer, Torchs):
        racer.step(microbatches)  # allocates its buffers
        racer.zero()
    buffers = racer.buffers() if isinstance(racer, Torchs) else []
    with SavedBytes([*racer.parameters().values(), *_data(microbatches), *buffers]) as meter:
        racer.step(microbatches)
    assert meter.live_bytes == 0, f"{meter.live_bytes} bytes are left after a step"
    return {"saved": meter.peak_bytes, **_besides(racer, buffers)}


def _data(microbatches: Sequence[Microbatch]) -> list[Tensor]:
    return [tensor for m in microbatches for tensor in (m.inputs, m.targets, m.weights)]


def _besides(racer: Contestant, buffers: list[Tensor]) -> dict[str, int]:
    if isinstance(racer, Torchs):
        return {"receiving": sum(b.nbytes for b in buffers), "sending": racer.held_peak}
    assert isinstance(racer, Ours)
    return dict(racer.runtime.ledger.peaks)


def main(chosen: measure.Options) -> dict[str, Any]:
    """All cases; prints the table and returns the figures."""
    found = {(case.world, case.microbatches, case.entry.name): run_case(case) for case in cases(chosen.quick)}
    rows = [
        [f"p {p}, m {m}, {name}", rank, *(share[kind] for kind in KINDS)]
        for (p, m, name), one in found.items()
        for rank, share in enumerate(one["ranks"])
    ]
    measure.show("Bytes of a step, in M_a", ["", "rank", *KINDS], rows)
    return {"cases": {f"p{p}_m{m}_{name}": one for (p, m, name), one in found.items()}, **_summary(found)}


def _summary(found: dict[tuple[int, int, str], dict[str, Any]]) -> dict[str, Any]:
    ours = {(p, m): one for (p, m, name), one in found.items() if name == "ours"}
    uneven = {m: one["total"] for (_, m, name), one in found.items() if name == "ours uneven"}
    results: dict[str, Any] = {"off_formula": max(one["off_formula"] for one in ours.values())}
    for (p, m), one in ours.items():
        for other in ("1f1b", "interleaved"):
            theirs = found[p, m, other]
            results[f"below_{other}_p{p}_m{m}"] = theirs["total"] / one["total"]
            results[f"below_{other}_with_accumulators_p{p}_m{m}"] = theirs["total"] / one["total_with_accumulators"]
    for m, total in uneven.items():
        results[f"uneven_below_1f1b_p2_m{m}"] = found[2, m, "1f1b"]["total"] / total
    for p in {p for p, _ in ours}:
        totals = {m: ours[p, m]["total"] for q, m in ours if q == p}
        results[f"growth_p{p}"] = totals[max(totals)] / totals[min(totals)]
    return results
