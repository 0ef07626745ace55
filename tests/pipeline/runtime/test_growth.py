"""A hundred steps leave nothing behind: no live slices, no bytes in the ledger, no memory."""

import gc
import os

import pytest

from benchmarks.pipeline.contestants import Entry, Ours
from benchmarks.pipeline.model import Size, batch
from tests.multi.harness import run_ranks
from tests.pipeline.runtime.test_equality import FORCED
from tests.pipeline.runtime.test_faults import made
from tests.pipeline.runtime.tiny import Tiny, padded
from thresher.pipeline.layout import even_bounds

STEPS, SETTLED = 100, 20
LIMIT_BYTES = 5_000_000
SIZE = Size(layers=4, width=64, heads=2, tokens=512)
"""Of which one step keeps 8 MB: whatever were left of each step would be seen."""


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(rank, world):
    """Bytes the process grew by after it settled, without garbage collection, and what the ledger still holds."""
    racer = Ours(SIZE, rank, world, 2, Entry("ours", "ours", 2, even_bounds(SIZE.tokens, 8)))
    microbatches = batch(SIZE, 2, 0)
    gc.disable()
    for step in range(STEPS):
        racer.zero()
        racer.step(microbatches)
        if step == SETTLED:
            settled = resident_bytes()
    grown = resident_bytes() - settled
    gc.enable()
    return grown, racer.runtime.ledger.live.total()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_a_hundred_steps_leave_nothing_behind():
    for grown, left in run_ranks(2, growth, timeout_s=200):
        assert left == 0
        assert grown < LIMIT_BYTES


def cycles(rank, world):
    """Objects that steps with an exchange left for the garbage collector to find."""
    found = []
    for pointwise in (False, True):
        runtime = made(rank, world, build=Tiny(pointwise=pointwise), **FORCED)
        runtime.step(padded(2, 4))
        gc.collect()
        gc.disable()
        runtime.step(padded(2, 4))
        found.append(gc.collect())
        gc.enable()
    return found


def test_shared_attention_leaves_no_cycles():
    for found in run_ranks(2, cycles, timeout_s=60):
        assert found == [0, 0]
