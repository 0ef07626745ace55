"""Rows on the move: whatever happens in whatever order, each has one slot, and its value moves by a quantum at most."""

from typing import ClassVar

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from tests.embeddings.policy.small import ALL_LEVELS, BACKEND, STORED_LEVELS, info, planned, table, train, values
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.controller import TierController
from thresher.embeddings.rows.tiered import FREE, SLOT_MASK, TieredTable
from thresher.embeddings.rows.tiers import Tier

ROWS, DIM = 40, 8
CONFIG = TierConfig(budget="100%", flat_below_bytes=0, levels=ALL_LEVELS, decay=0.1, spread=2.0)
OPTIMIZERS = tuple(TableOptimizer(name=name, lr=0.1) for name in ("sgd", "rowwise_adagrad", "adam"))
ROW = st.integers(0, ROWS - 1)


def quantum(shard: TieredTable, before: Tensor) -> Tensor:
    """[rows, DIM] how far a value may have moved by being stored as the table stores it now."""
    scale = shard.desc[:, 1].contiguous().view(torch.float32).unsqueeze(1)
    half = torch.clamp(before.abs() * 2.0**-10, min=2.0**-24)
    tier = shard.tier_of().unsqueeze(1)
    allowed = torch.where((tier == Tier.INT8) | (tier == Tier.INT4), scale * 1.0001, torch.zeros(()))
    allowed = torch.where(tier == Tier.FP16, half, allowed.expand_as(before))
    return torch.where(tier == Tier.DROPPED, before.abs(), allowed)


class Moves(RuleBasedStateMachine):
    """Updates, demotions, rebalances, compactions and writes of one table, in any order."""

    coverage: ClassVar[set[str]] = set()

    @initialize(number=st.integers(0, len(OPTIMIZERS) - 1))
    def begin(self, number: int) -> None:
        self.optimizer = OPTIMIZERS[number]
        self.plan = planned(CONFIG, info("t", ROWS, DIM), optimizer=self.optimizer)
        self.shard = table(self.plan.tables[0])
        self.controller = TierController([self.shard], self.plan, CONFIG, BACKEND)

    @rule(ids=st.lists(ROW, max_size=30), size=st.floats(0.0, 3.0), weight=st.floats(0.0, 8.0), seed=st.integers(0, 99))
    def update(self, ids: list[int], size: float, weight: float, seed: int) -> None:
        rows = torch.tensor(ids, dtype=torch.int64)
        grad = size * torch.randn(len(rows), DIM, generator=torch.Generator().manual_seed(seed))
        before, tiers = values(self.shard), self.shard.tier_of()
        train([self.shard], [rows], [grad], self.optimizer, torch.full((len(rows),), weight))
        now = self.shard.tier_of()
        touched = torch.bincount(rows, minlength=ROWS) > 0
        entered = torch.where(tiers == Tier.NONE, int(self.shard.entry), tiers)
        wanted = entered
        for level in self.shard.levels:
            above = self.shard.stat[:, 1] > torch.tensor(self.shard.promote_above[level] * self.shard.gain).float()
            wanted = torch.where(above, torch.clamp(entered, min=int(level)).maximum(wanted), wanted)
        assert torch.equal(now, torch.where(touched, wanted, tiers))
        assert torch.equal(values(self.shard)[~touched], before[~touched])
        if self.optimizer.name == "sgd":
            expected = before.index_add(0, rows, -0.1 * grad)
            error = (values(self.shard) - expected).abs() - 1e-5 * (1 + expected.abs())
            assert bool((error <= quantum(self.shard, expected))[touched & (tiers != Tier.DROPPED)].all())
        self.coverage.update(
            f"{Tier(a).name}-{Tier(b).name}" for a, b in zip(tiers.tolist(), now.tolist(), strict=True)
        )

    @rule(first=ROW, count=st.integers(0, ROWS))
    def demote(self, first: int, count: int) -> None:
        count = min(count, ROWS - first)
        before, tiers = values(self.shard), self.shard.tier_of()
        edges = [self.shard.gain * edge for edge in self.shard.keep_from]
        moved = BACKEND.demote(self.shard, first, count, edges)
        now = self.shard.tier_of()
        inside = (torch.arange(ROWS) >= first) & (torch.arange(ROWS) < first + count)
        assert torch.equal(now[~inside], tiers[~inside])
        assert int((now != tiers).sum()) == moved
        assert bool((now <= tiers).all())
        kept = torch.tensor(edges, dtype=torch.float32)
        priority = self.shard.stat[:, 1]
        assert bool((priority >= kept[now])[inside].all())
        # Down only where the priority fell below what the tier, and each tier on the way, asks for.
        for level in self.shard.levels:
            passed = (now < level) & (tiers >= level)
            assert bool((priority < kept[level])[passed].all())
        after = values(self.shard)
        stayed = now == tiers
        assert torch.equal(after[stayed], before[stayed])
        assert bool(((after - before).abs() <= quantum(self.shard, before))[~stayed].all())
        self.coverage.update(
            f"{Tier(a).name}-{Tier(b).name}" for a, b in zip(tiers.tolist(), now.tolist(), strict=True)
        )

    @rule(share=st.floats(0.0, 1.0))
    def rebalance(self, share: float) -> None:
        least, most = self.plan.tables[0].least_bytes(), ROWS * (16 + self.shard.record_bytes(Tier.FP32))
        self.controller.plan = self.plan.model_copy(update={"budget_bytes": int(least + share * (most - least))})
        self.controller.step += 1
        self.controller.rebalance()
        assert self.controller.ledger().live_bytes <= self.controller.plan.budget_bytes
        for tier in self.shard.stored_levels:
            assert int(self.shard.count[tier, FREE]) == 0

    @rule(tier=st.sampled_from(STORED_LEVELS))
    def compact(self, tier: Tier) -> None:
        before = values(self.shard)
        BACKEND.compact(self.shard, tier)
        assert torch.equal(values(self.shard), before)
        assert self.shard.count[tier].tolist() == [int((self.shard.tier_of() == tier).sum()), 0]

    @rule(chosen=st.sets(ROW, max_size=10), tier=st.sampled_from((Tier.NONE, *STORED_LEVELS)))
    def write(self, chosen: set[int], tier: Tier) -> None:
        rows = torch.tensor(sorted(chosen), dtype=torch.int64)
        before = values(self.shard)
        fresh = torch.cos(torch.arange(len(rows) * DIM, dtype=torch.float32)).view(-1, DIM)
        BACKEND.write(self.shard, rows, fresh, torch.full((len(rows),), int(tier)))
        others = torch.ones(ROWS, dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(values(self.shard)[others], before[others])
        if tier is not Tier.NONE:
            wanted = before.index_copy(0, rows, fresh)
            # Nearest: half a quantum, and the halves may lie a rounding apart.
            error = (values(self.shard) - wanted).abs()
            assert bool((error <= 0.501 * quantum(self.shard, wanted) + 1e-7)[rows].all())

    @precondition(lambda self: max(self.shard.keep_from) > 0)
    @rule(ids=st.lists(ROW, min_size=1, max_size=30))
    def flip_flop(self, ids: list[int]) -> None:
        """A row that was just lowered does not rise, and one that just rose is not lowered, at the same priority."""
        rows = torch.tensor(ids, dtype=torch.int64)
        start = self.shard.tier_of()
        self.demote(0, ROWS)
        lowered = self.shard.tier_of()
        decay, self.shard.decay = self.shard.decay, 0.0
        train([self.shard], [rows], [torch.zeros(len(rows), DIM)], importance=torch.zeros(len(rows)))
        self.shard.decay = decay
        risen = self.shard.tier_of()
        fell, rose = lowered < start, (risen > lowered) & (lowered != Tier.NONE)
        assert torch.equal(risen[fell], lowered[fell])
        self.demote(0, ROWS)
        assert torch.equal(self.shard.tier_of()[rose], risen[rose])
        self.coverage.update(["fell"] * bool(fell.any()) + ["rose"] * bool(rose.any()))

    @invariant()
    def every_row_has_one_slot(self) -> None:
        tiers, slots = self.shard.tier_of(), self.shard.desc[:, 0] & SLOT_MASK
        for tier in self.shard.stored_levels:
            used = slots[tiers == tier].tolist()
            high, n_free = self.shard.count[tier].tolist()
            free = self.shard.free[tier][:n_free].tolist()
            assert sorted([*used, *free]) == list(range(high))
            assert high <= self.shard.slots[tier]
        bare = (tiers == Tier.NONE) | (tiers == Tier.DROPPED)
        assert not bool(self.shard.desc[bare, 1].any())
        assert bool((self.shard.stat[:, 1] >= 0).all())


def run(examples: int) -> set[str]:
    Moves.coverage.clear()
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(Moves, settings=settings)
    return Moves.coverage


def test_rows_on_the_move() -> None:
    run(25)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rows_on_the_move_many_times() -> None:
    seen = run(1000)
    stored = [tier.name for tier in STORED_LEVELS]
    assert {"fell", "rose"} <= seen
    # Each level was left for each other one, up and down.
    assert {f"{a}-{b}" for a in stored for b in stored} <= seen
    assert {f"{tier}-DROPPED" for tier in stored} | {f"DROPPED-{tier}" for tier in stored} <= seen
