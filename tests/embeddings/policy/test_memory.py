"""Memory that tables with tiers take, as the system counts it and as the ledger does."""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.chaos.forks import isolated
from tests.embeddings.policy.small import info, planned, table, zipf_ids
from thresher.embeddings.group import TableGroup
from thresher.embeddings.kernels.backend import pick_backend
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.controller import TierController
from thresher.embeddings.policy.plan import TierPlan
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

ROWS, DIM, FIELDS = 400_000, 64, 5
BATCH = 20_000
CONFIG = TierConfig(budget="37%", rebalance_every=10)
ROWWISE = TableOptimizer()


def resident_bytes() -> int:
    """Anonymous memory of this process, without what the allocator keeps of temporaries that are gone."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def plan_of(fields: int, rows: int, config: TierConfig = CONFIG) -> TierPlan:
    return planned(config, *(info(f"f{n}", rows, DIM) for n in range(fields)), optimizer=ROWWISE)


def written(fields: int, rows: int) -> tuple[list[TieredTable], TierController]:
    """Tables of which 5% of the rows are fp32, 15% fp16, the rest int8."""
    backend, plan = pick_backend(torch.device("cpu")), plan_of(fields, rows)
    tables = [table(entry) for entry in plan.tables]
    for shard in tables:
        for first in range(0, rows, BATCH):
            chosen = torch.arange(first, first + BATCH)
            place = (chosen * 7919 % rows) / rows  # rows of a tier lie everywhere
            tiers = torch.full((BATCH,), int(Tier.INT8))
            tiers[place < 0.2] = int(Tier.FP16)
            tiers[place < 0.05] = int(Tier.FP32)
            backend.write(shard, chosen, torch.ones(BATCH, DIM), tiers)
        for tier in shard.stored_levels:
            backend.compact(shard, tier)
    return tables, TierController(tables, plan, CONFIG, backend)


def trained(fields: int, rows: int) -> tuple[list[TieredTable], TierController]:
    """Tables all of whose rows were met, and popular ones often."""
    backend, plan = pick_backend(torch.device("cpu")), plan_of(fields, rows)
    tables = [table(entry) for entry in plan.tables]
    controller = TierController(tables, plan, CONFIG, backend)
    group = TableGroup(tables, range(fields), Pooling.SUM, ROWWISE, backend)
    for step in range(rows // (BATCH // 2)):
        fresh = torch.arange(BATCH // 2) + step * (BATCH // 2)
        popular = zipf_ids(step, BATCH // 2, 30_000, 1.05) * 13 % rows
        ids = torch.cat([torch.cat([fresh, popular])] * fields)
        out = group(ids, torch.arange(len(ids) + 1))
        out.backward(torch.ones_like(out))
        controller.after_step([group.stats])
    return tables, controller


@dataclass(frozen=True)
class Shares:
    """Bytes over those of ``FIELDS`` fp32 tables with state: by the system, by the ledger, and held."""

    resident: float
    live: float
    held: float

    @staticmethod
    def of(controller: TierController, before: int) -> "Shares":
        full = FIELDS * ROWS * (DIM * 4 + 4)
        ledger = controller.ledger()
        return Shares((resident_bytes() - before) / full, ledger.live_bytes / full, ledger.held_bytes / full)


def written_share() -> Shares:
    torch.set_num_threads(1)
    written(FIELDS, BATCH)  # what the allocator keeps for temporaries is there before
    before = resident_bytes()
    return Shares.of(written(FIELDS, ROWS)[1], before)


def trained_shares() -> tuple[Shares, Shares]:
    """With all fields, and after a fifth of them was taken away."""
    torch.set_num_threads(1)
    trained(FIELDS, BATCH)
    before = resident_bytes()
    tables, controller = trained(FIELDS, ROWS)
    assert all(int((shard.tier_of() == Tier.NONE).sum()) == 0 for shard in tables)
    controller.rebalance()
    whole = Shares.of(controller, before)
    del tables[-1], controller
    pruned = TierController(tables, plan_of(FIELDS - 1, ROWS), CONFIG, pick_backend(torch.device("cpu")))
    pruned.step = 1000
    pruned.rebalance()
    return whole, Shares.of(pruned, before)


@pytest.mark.slow
def test_5_15_80_percent_of_rows_take_40_percent_of_the_memory() -> None:
    found = isolated(written_share, timeout_s=280)
    assert found.live == pytest.approx((16 + 0.05 * 256 + 0.15 * 128 + 0.8 * 64) / 260, abs=1e-4)
    assert found.live <= found.held <= 0.40
    assert found.held - 0.05 <= found.resident <= found.held + 0.02
    assert found.resident <= 0.40


@pytest.mark.slow
def test_training_takes_40_percent_and_30_with_a_fifth_of_the_fields_pruned() -> None:
    whole, pruned = isolated(trained_shares, timeout_s=280)
    for found, most in ((whole, 0.40), (pruned, 0.30)):
        assert found.live <= found.held <= most
        assert found.held - 0.05 <= found.resident <= found.held + 0.02
        assert found.resident <= most
