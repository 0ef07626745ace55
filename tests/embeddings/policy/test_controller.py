"""What happens after each step: priorities, the clock hand, rebalances, budgets; cutting tables changes nothing."""

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.embeddings.policy.small import ALL_LEVELS, BACKEND, info, planned, table, train, values, zipf_ids
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.controller import BLOCK_ROWS, TierController, is_due, next_due
from thresher.embeddings.policy.ledger import Ledger
from thresher.embeddings.policy.plan import TierPlan
from thresher.embeddings.rows.tiered import RENORMALISE, TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import ConfigError

CONFIG = TierConfig(
    budget="30%", flat_below_bytes=0, levels=ALL_LEVELS, decay=0.05, spread=2.0, rebalance_every=8, sweep_every=4
)
ROWS = 3 * BLOCK_ROWS + 500


class Ranks:
    """Controllers that step together, each in a thread, with a sum that waits for all of them."""

    def __init__(self, shards: Sequence[Sequence[TieredTable]], plan: TierPlan, config: TierConfig) -> None:
        self._barrier, self._given = threading.Barrier(len(shards)), [torch.zeros(0)] * len(shards)
        self.controllers = [
            TierController(tables, plan, config, BACKEND, flat_bytes=10, all_reduce=self._sum(rank))
            for rank, tables in enumerate(shards)
        ]

    def _sum(self, rank: int) -> Callable[[Tensor], Tensor]:
        def total(own: Tensor) -> Tensor:
            self._given[rank] = own.clone()
            self._barrier.wait(60)
            result = torch.stack(self._given).sum(0)
            self._barrier.wait(60)
            return result

        return total

    def run(self, work: Callable[[TierController], object]) -> list[object]:
        results: list[object] = [None] * len(self.controllers)

        def one(rank: int) -> None:
            try:
                results[rank] = work(self.controllers[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


def two_tables() -> TierPlan:
    return planned(CONFIG, info("a", ROWS, 16), info("b", 700, 32))


def lookups(step: int) -> tuple[Tensor, Tensor]:
    """Ids of both tables, so skewed that tiers differ."""
    return zipf_ids(step, 600, ROWS), zipf_ids(1000 + step, 200, 700)


def gradient(ids: Tensor, dim: int, step: int) -> Tensor:
    """[n, dim], a function of the position, so that any routing of ids can tell its part."""
    everything = torch.arange(len(ids) * dim, dtype=torch.float32).view(-1, dim)
    return torch.sin(everything + step)


def step_of_rows(tables: Sequence[TieredTable], plan: TierPlan, step: int) -> None:
    """Trains shards of the plan's tables with the part of the step's ids that are theirs."""
    parts, grads = [], []
    for shard in tables:
        number = [entry.path for entry in plan.tables].index(shard.path)
        ids = lookups(step)[number]
        own = (ids >= shard.row0) & (ids < shard.row0 + shard.rows)
        full = gradient(ids, plan.tables[number].dim, step)
        parts.append(ids[own] - shard.row0)
        grads.append(full[own][:, shard.col0 : shard.col0 + shard.dim])
    for shard, ids, grad in zip(tables, parts, grads, strict=True):
        train([shard], [ids], [grad])


def test_rows_cut_over_ranks_end_in_the_tiers_of_whole_tables() -> None:
    plan = two_tables()
    whole = [table(entry) for entry in plan.tables]
    a, b = plan.tables
    cuts = [0, 3001, BLOCK_ROWS * 2 + 5, ROWS]
    shards = [[table(a, row0=low, rows=high - low)] for low, high in pairwise(cuts)]
    shards[1].append(table(b))
    # The same bytes of flat tables: 10 on each of three ranks.
    alone = TierController(whole, plan, CONFIG, BACKEND, flat_bytes=30)
    ranks = Ranks(shards, plan, CONFIG)
    for step in range(20):
        step_of_rows(whole, plan, step)
        alone.after_step()
        for tables in shards:
            step_of_rows(tables, plan, step)
        assert ranks.run(TierController.after_step) == [None] * 3
    tiers = torch.cat([part[0].tier_of() for part in shards])
    assert len(tiers.unique()) == 6
    assert torch.equal(tiers, whole[0].tier_of())
    assert torch.equal(torch.cat([values(part[0]) for part in shards]), values(whole[0]))
    assert torch.equal(values(shards[1][1]), values(whole[1]))
    ledgers = ranks.run(TierController.ledger)
    assert all(ledger == alone_ledger(alone, ledger) for ledger in ledgers)


def alone_ledger(alone: TierController, other: object) -> Ledger:
    """The ledger of one rank; pages held differ with the cuts."""
    assert isinstance(other, Ledger)
    found = alone.ledger()
    entries = [(e.path, e.rows, e.live_bytes, e.fp32_bytes) for e in found.tables]
    assert [(e.path, e.rows, e.live_bytes, e.fp32_bytes) for e in other.tables] == entries
    assert (other.moves, other.flat_bytes, other.live_bytes) == (found.moves, found.flat_bytes, found.live_bytes)
    return other


def test_columns_cut_over_ranks_stay_in_step_and_pay_for_their_headers() -> None:
    plan = two_tables()
    plan = plan.model_copy(update={"budget_bytes": plan.budget_bytes + 16 * ROWS})
    a, b = plan.tables
    shards = [[table(a, dim=8)], [table(a, dim=8, col0=8), table(b)]]
    ranks = Ranks(shards, plan, CONFIG)
    for step in range(20):
        for tables in shards:
            step_of_rows(tables, plan, step)
        assert ranks.run(TierController.after_step) == [None] * 2
        if is_due(step + 1, CONFIG.rebalance_every):
            ledger = ranks.run(TierController.ledger)[0]
            assert isinstance(ledger, Ledger)
            assert ledger.live_bytes <= plan.budget_bytes
            assert sum(ledger.tables[0].rows) == ROWS
            assert ledger.tables[0].live_bytes == sum(tables[0].live_bytes for tables in shards)
    assert torch.equal(shards[0][0].tier_of(), shards[1][0].tier_of())
    assert len(shards[0][0].tier_of().unique()) == 6


def test_a_budget_that_column_headers_exceed_stops_all_ranks_at_the_first_step() -> None:
    config = TierConfig(budget="66%", flat_below_bytes=0)
    plan = planned(config, info("a", 1000, 16))
    ranks = Ranks([[table(plan.tables[0], dim=8)], [table(plan.tables[0], dim=8, col0=8)]], plan, config)
    for error in ranks.run(TierController.after_step):
        assert isinstance(error, ConfigError)
        assert "cannot take less than 48.0 kB" in error.message


def test_the_budget_holds_after_each_rebalance_and_is_used() -> None:
    config = CONFIG.model_copy(update={"levels": ("int8", "fp16", "fp32"), "budget": "50%"})
    plan = planned(config, info("a", 5000, 64), info("b", 3000, 32))
    tables = [table(entry) for entry in plan.tables]
    controller = TierController(tables, plan, config, BACKEND, flat_bytes=1234)
    for step in range(40):
        ids = zipf_ids(step, 2000, 5000), zipf_ids(step + 500, 2000, 3000)
        train(tables, ids, [gradient(i, t.dim, step) for i, t in zip(ids, tables, strict=True)])
        controller.after_step()
        if is_due(step + 1, config.rebalance_every):
            assert controller.ledger().live_bytes <= plan.budget_bytes
            assert controller.ledger().held_bytes <= plan.budget_bytes + 2 * 5 * 4096
    assert controller.ledger().live_bytes > 0.8 * plan.budget_bytes
    assert controller.moves.demoted > 0


def test_the_ledger_counts_the_bytes_that_the_storage_holds() -> None:
    adam = TableOptimizer(name="adam", lr=0.01)
    plan = planned(CONFIG, info("a", 3000, 16), optimizer=adam)
    shard = table(plan.tables[0])
    controller = TierController([shard], plan, CONFIG, BACKEND, flat_bytes=77)
    for step in range(17):
        ids = zipf_ids(step, 800, 3000)
        group = train([shard], [ids], [gradient(ids, 16, step)], adam)
        controller.after_step([group.stats])
    ledger = controller.ledger()
    headers = shard.desc.nbytes + shard.stat.nbytes
    records = 0
    tiers, slots = shard.tier_of(), shard.desc[:, 0] & (1 << 29) - 1
    for tier, slab in shard.slabs.items():
        used = slots[tiers == tier].unique()
        records += len(used) * (slab.nbytes // shard.slots[tier])
        assert ledger.rows[tier] == len(used)
    assert len(tiers.unique()) == 6
    assert ledger.live_bytes == headers + records + 77
    assert ledger.rows == tuple(torch.bincount(tiers, minlength=6).tolist())
    assert ledger.tables[0].fp32_bytes == 3000 * 16 * 12 == ledger.fp32_bytes
    assert ledger.share == ledger.live_bytes / ledger.fp32_bytes
    assert ledger.tables[0].share == (ledger.live_bytes - 77) / ledger.fp32_bytes
    # Nothing stands beyond what is held, in whole pages.
    held = 2 * -(-shard.desc.nbytes // 4096) * 4096
    for tier, slab in shard.slabs.items():
        end = -(-int(shard.count[tier, 0]) * (slab.nbytes // shard.slots[tier]) // 4096) * 4096
        assert not slab[end:].any()
        held += end
    assert ledger.held_bytes == held + 77


def test_moves_are_counted() -> None:
    plan = planned(CONFIG, info("a", 3000, 16))
    shard = table(plan.tables[0])
    controller = TierController([shard], plan, CONFIG, BACKEND)
    up = down = 0
    for step in range(20):
        before = shard.tier_of()
        ids = zipf_ids(step, 500, 3000)
        group = train([shard], [ids], [gradient(ids, 16, step)])
        moved = shard.tier_of()
        controller.after_step([group.stats])
        up += int(((moved > before) & (before != Tier.NONE)).sum())
        down += int((shard.tier_of() < moved).sum())
        assert (controller.moves.promoted, controller.moves.demoted) == (up, down)
    assert up > 0
    assert down > 0


@pytest.mark.parametrize("decay", [0.01, 0.3])
def test_lazy_decay_equals_decay_of_every_row_at_every_step(decay: float) -> None:
    config = CONFIG.model_copy(update={"decay": decay})
    plan = planned(config, info("a", 200, 16))
    shard = table(plan.tables[0])
    TierController([shard], plan, config, BACKEND)
    explicit = torch.zeros(200, dtype=torch.float64)
    renormalised = 0
    for step in range(300):
        ids = zipf_ids(step, 60, 200)
        importance = torch.where(torch.arange(60) % 3 == 0, 4.0, 1.0)
        gain = shard.gain
        train([shard], [ids], [torch.zeros(60, 16)], importance=importance)
        renormalised += shard.gain < gain
        explicit = (1 - decay) * explicit + decay * torch.bincount(ids, importance.double(), minlength=200)
    found = shard.stat[:, 1].double() / shard.gain
    seen = explicit > 2.0**-40
    assert torch.allclose(found[seen], explicit[seen], rtol=1e-6, atol=0)
    assert renormalised == math.floor(-300 * math.log2(1 - decay) / math.log2(RENORMALISE))


class Recorder(Reference):
    """Notes which rows are looked at."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def demote(self, table: TieredTable, first: int, count: int, keep_from: Sequence[float]) -> int:
        self.seen.append((table.row0, first, count))
        return 0


@pytest.mark.parametrize("row0", [0, 3, BLOCK_ROWS, 2 * BLOCK_ROWS + 17])
@pytest.mark.parametrize("every", [1, 2, 3, 64])
def test_the_hand_looks_at_every_row_once_in_a_round(row0: int, every: int) -> None:
    plan = planned(CONFIG, info("a", 5 * BLOCK_ROWS, 16))
    shard = table(plan.tables[0], row0=row0, rows=2 * BLOCK_ROWS + 100)
    recorder = Recorder()
    config = CONFIG.model_copy(update={"sweep_every": every, "rebalance_every": 10_000})
    controller = TierController([shard], plan, config, recorder)
    controller.step = 1024  # no rebalance within the next 500 steps
    shard.keep_from[Tier.FP16] = 1.0
    looked = torch.zeros(shard.rows, dtype=torch.int64)
    for _ in range(every):
        recorder.seen.clear()
        controller.after_step()
        for start, first, count in recorder.seen:
            assert (start + first) // BLOCK_ROWS == (start + first + count - 1) // BLOCK_ROWS
            assert (start + first) // BLOCK_ROWS % every == controller.step % every
            looked[first : first + count] += 1
    assert bool((looked == 1).all())


def test_nobody_is_looked_at_before_there_are_thresholds() -> None:
    plan = planned(CONFIG, info("a", 1000, 16))
    recorder = Recorder()
    controller = TierController([table(plan.tables[0])], plan, CONFIG, recorder)
    controller.step = 2
    controller.after_step()
    assert recorder.seen == []


def test_thresholds_are_chosen_often_at_first() -> None:
    assert [step for step in range(1, 400) if is_due(step, 100)] == [1, 2, 4, 8, 16, 32, 64, 100, 200, 300]
    assert [step for step in range(1, 9) if is_due(step, 1)] == list(range(1, 9))
    assert [next_due(step, 100) for step in (0, 1, 2, 64, 65, 100, 399)] == [1, 2, 4, 100, 100, 200, 400]


def test_room_is_left_for_rows_that_will_enter() -> None:
    """Half of the rows have entered in 8 steps; as many are expected in the next 8."""
    config = CONFIG.model_copy(update={"levels": ("int8", "fp32"), "budget": "60%"})
    plan = planned(config, info("a", 1000, 64))
    shard = table(plan.tables[0])
    controller = TierController([shard], plan, config, BACKEND)
    controller.step = 8
    train([shard], [torch.arange(500)], [torch.zeros(500, 64)])
    shard.stat[:500, 1] = torch.arange(1, 501) / 500 * 64
    controller.rebalance()
    above = int((shard.stat[:, 1] / shard.gain >= shard.keep_from[Tier.FP32]).sum())
    free = plan.budget_bytes - 1000 * 16 - 1000 * 64
    assert 0.85 * free / 192 < above <= free / 192


def test_a_row_between_the_thresholds_stays_where_it_is() -> None:
    config = TierConfig(budget="100%", flat_below_bytes=0, sweep_every=4, rebalance_every=10_000)
    plan = planned(config, info("a", 100, 8))
    shard = table(plan.tables[0])
    controller = TierController([shard], plan, config, BACKEND)
    controller.step, shard.decay = 1024, 0.05
    shard.keep_from[Tier.FP16], shard.promote_above[Tier.FP16] = 0.9, 1.1
    for start, tier in ((Tier.INT8, Tier.INT8), (Tier.FP16, Tier.FP16)):
        BACKEND.write(shard, torch.tensor([7]), torch.ones(1, 8), torch.tensor([int(start)]))
        shard.stat[7, 1] = 1.0 * shard.gain
        for step in range(64):
            # 1.05 or 1 - 0.05: the row is read every other step.
            ids = torch.tensor([7] * (2 * (step % 2)), dtype=torch.int64)
            group = train([shard], [ids], [torch.zeros(len(ids), 8)])
            controller.after_step([group.stats])
            assert 0.9 < float(shard.stat[7, 1] / shard.gain) < 1.1
            assert int(shard.tier_of()[7]) == tier
    assert controller.moves.promoted == controller.moves.demoted == 0


def test_a_resumed_controller_goes_on_as_if_nothing_had_been() -> None:
    plan = two_tables()

    def run(stop: int) -> list[TieredTable]:
        tables = [table(entry) for entry in plan.tables]
        controller = TierController(tables, plan, CONFIG, BACKEND)
        controller.factors = {"bags.b": 4.0}
        for step in range(19):
            if step == stop:
                state = controller.state_dict()
                controller = TierController(tables, plan, CONFIG, BACKEND)
                controller.load_state_dict(state)
            step_of_rows(tables, plan, step)
            controller.after_step()
        return tables

    through, resumed = run(100), run(11)
    for one, other in zip(through, resumed, strict=True):
        assert torch.equal(one.tier_of(), other.tier_of())
        assert torch.equal(values(one), values(other))
        assert one.keep_from == other.keep_from


def test_a_field_that_matters_more_keeps_more_rows() -> None:
    plan = planned(CONFIG, info("a", 700, 16), info("b", 700, 16))
    kept = {}
    for factor in (1.0, 50.0):
        tables = [table(entry) for entry in plan.tables]
        controller = TierController(tables, plan, CONFIG, BACKEND)
        controller.factors = {"bags.b": factor}
        for step in range(16):
            ids = [zipf_ids(step, 300, 700)] * 2
            train(tables, ids, [torch.zeros(300, 16)] * 2)
            controller.after_step()
        kept[factor] = controller.ledger().tables[1].live_bytes
    assert kept[50.0] > 1.1 * kept[1.0]


def test_uniform_int8_has_no_thresholds() -> None:
    config = TierConfig(budget="100%", flat_below_bytes=0, levels=("int8",))
    plan = planned(config, info("a", 300, 16))
    shard = table(plan.tables[0])
    controller = TierController([shard], plan, config, BACKEND)
    for step in range(4):
        ids = zipf_ids(step, 100, 300)
        train([shard], [ids], [gradient(ids, 16, step)])
        controller.after_step()
    assert set(shard.tier_of().tolist()) == {Tier.NONE, Tier.INT8}
