"""Tables that nobody reads any more give their memory back."""

import torch

from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.region import forget
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

MEGABYTE = 1 << 20


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_a_flat_table_gives_up_its_rows_and_their_memory():
    table = FlatTable("t", 1 << 16, 128, scalar=True, vectors=1)
    for values in (table.weights, table.scalar, *table.vectors):
        values.fill_(3.0)
    held = resident()
    assert table.nbytes == (1 << 16) * (2 * 128 * 4 + 4)
    table.release()
    assert held - resident() > 60 * MEGABYTE
    assert table.nbytes == 0
    assert not any(bool(values.any()) for values in (table.weights, table.scalar, *table.vectors))


def test_neighbours_in_memory_keep_their_rows():
    memory = FlatTable("t", 3000, 12, scalar=False, vectors=0).weights.fill_(5.0)
    first, second, third = torch.split(memory, 1000)
    FlatTable("t", 1000, 12, scalar=False, vectors=0, weights=second).release()
    assert not bool(second.any())
    assert bool((first == 5.0).all())
    assert bool((third == 5.0).all())


def test_what_is_smaller_than_a_page_is_zeroed():
    values = torch.ones(5)
    forget(values)
    assert values.tolist() == [0.0] * 5


def test_a_table_with_tiers_gives_up_headers_and_records():
    table = TieredTable("t", "m.t", 1 << 15, 256, seed=0, init_scale=0.1, scalar=True, vectors=0)
    table.count[Tier.FP32, 0] = 1 << 15
    for values in (table.slabs[Tier.FP32], table.desc, table.stat):
        values.fill_(1)
    held = resident()
    assert table.live_bytes == (1 << 15) * (16 + 1024)
    table.release()
    assert held - resident() > 30 * MEGABYTE
    assert table.live_bytes == table.held_bytes == 0
    assert set(table.tier_of().tolist()) == {Tier.NONE}
