"""F-Quantization while training: after each step rows that lost their priority are lowered, and thresholds follow
the budget."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import HISTOGRAM_BUCKETS, Backend, UpdateStats
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.ledger import AllReduce, Ledger, Moves, take_ledger
from thresher.embeddings.policy.plan import TableTierPlan, TierPlan, require_room
from thresher.embeddings.policy.storage import SlabFiles
from thresher.embeddings.policy.thresholds import TableRows, solve
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

BLOCK_ROWS = 4096
"""Rows (of the whole table) that the clock hand looks at together."""
_LINE = len(Tier) + HISTOGRAM_BUCKETS


class ControllerState(TypedDict):
    """What a checkpoint holds of a controller."""

    step: int
    factors: dict[str, float]


@dataclass(frozen=True)
class _Census:
    """Sums over all ranks.

    Attributes:
        fixed_bytes: of flat tables and of headers.
        live_bytes: of everything.
        row_bytes: [tables, 6] bytes of a row's records by tier, over its column shards.
        histograms: [tables, 512] rows by priority.
    """

    fixed_bytes: int
    live_bytes: int
    row_bytes: Tensor
    histograms: Tensor


class TierController:
    """Keeps the rows of a model's tables in their tiers.

    Everything it does is a function of sums over all shards and of the rows themselves: tables cut by rows end up as
    whole ones do. A table cut by columns has more headers, which count.

    What a checkpoint must hold: ``step`` and ``factors`` (``state_dict``), and of each table ``step``, ``gain``,
    ``keep_from`` and ``promote_above``.

    Args:
        tables: this rank's shards of tables with tiers.
        flat_bytes: bytes of this rank's shards of flat tables, optimizer state included.
        all_reduce: None for one rank.
        files: those of the tables whose slabs live in files; their memory is bounded after each step.

    Attributes:
        step: training steps done. A table's own ``step`` counts its updates, of which a step may have several.
        moves: rows moved on this rank since the start.
        factors: by path of the table, what its priorities are multiplied by in the choice of thresholds (importance
            of its fields, above 0); 1 where not given. Must be the same on all ranks.
    """

    def __init__(
        self,
        tables: Sequence[TieredTable],
        plan: TierPlan,
        config: TierConfig,
        backend: Backend,
        *,
        flat_bytes: int = 0,
        all_reduce: AllReduce | None = None,
        files: SlabFiles | None = None,
    ) -> None:
        self.tables, self.plan, self.config, self.backend = tuple(tables), plan, config, backend
        self.flat_bytes, self._all_reduce, self._files = flat_bytes, all_reduce, files
        self.step = 0
        self.moves = Moves()
        self.factors: dict[str, float] = {}
        for table in self.tables:
            table.decay = config.decay

    def after_step(self, updates: Iterable[UpdateStats] = ()) -> None:
        """Ends a training step. Collective at rebalances; every rank calls it after every step.

        Args:
            updates: what the step's updates did.

        Raises:
            ConfigError: at the first rebalance: with the headers of column shards the budget cannot be met.
            PlanError: slabs live in files, and the disk is almost full.
        """
        self.step += 1
        for stats in updates:
            self.moves = self.moves.updated(stats)
        if is_due(self.step, self.config.rebalance_every):
            self.rebalance()
        else:
            self._advance_hand()
        if self._files is not None:
            self._files.after_step()

    def rebalance(self) -> None:
        """Chooses thresholds, and lowers all rows below them if the tables take more than they may. Collective.

        Rows that will probably enter before the next time count as rows in the lowest tier: as many a step as there
        were until now.
        """
        census = self._census()
        plans = self.plan.tiered
        rows = [self._table_rows(table, n, census) for n, table in enumerate(plans)]
        lowest = sum(table.rows * entry.row_bytes[0] for table, entry in zip(plans, rows, strict=True))
        require_room(self.plan, census.fixed_bytes + lowest)
        reserve = sum(self._entering_bytes(table, n, census) for n, table in enumerate(plans))
        allowed = self.plan.budget_bytes - reserve
        chosen = solve(rows, allowed - census.fixed_bytes, self.config.spread, self.config.hysteresis)
        thresholds = {table.path: found for table, found in zip(plans, chosen, strict=True)}
        for table in self.tables:
            table.keep_from = list(thresholds[table.path].keep_from)
            table.promote_above = list(thresholds[table.path].promote_above)
        if census.live_bytes > allowed:
            for table in self.tables:
                self._demote(table, 0, table.rows)
        self._compact()

    def ledger(self) -> Ledger:
        """Rows and bytes of all ranks' tables. Collective."""
        return take_ledger(self.plan, self.tables, self.flat_bytes, self.moves, self._all_reduce)

    def local_ledger(self) -> Ledger:
        """Rows and bytes of this rank's shards."""
        return take_ledger(self.plan, self.tables, self.flat_bytes, self.moves, None)

    def state_dict(self) -> ControllerState:
        """Plain values, the same on all ranks."""
        return {"step": self.step, "factors": dict(self.factors)}

    def load_state_dict(self, state: ControllerState) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.step, self.factors = state["step"], dict(state["factors"])

    def _advance_hand(self) -> None:
        """Lowers rows of the blocks whose turn it is: block b of a table in steps congruent to b."""
        every = self.config.sweep_every
        for table in self.tables:
            end = table.row0 + table.rows
            block = table.row0 // BLOCK_ROWS
            block += (self.step - block) % every
            for first in range(block * BLOCK_ROWS, end, every * BLOCK_ROWS):
                begin = max(first, table.row0)
                self._demote(table, begin - table.row0, min(first + BLOCK_ROWS, end) - begin)

    def _demote(self, table: TieredTable, first: int, count: int) -> None:
        if not any(table.keep_from):
            return
        moved = self.backend.demote(table, first, count, [table.gain * edge for edge in table.keep_from])
        self.moves = replace(self.moves, demoted=self.moves.demoted + moved)

    def _compact(self) -> None:
        for table in self.tables:
            for tier in table.stored_levels:
                self.backend.compact(table, tier)

    def _census(self) -> _Census:
        """One all-reduce: whole numbers, so its order does not matter."""
        number = {table.path: n for n, table in enumerate(self.plan.tiered)}
        sums = torch.zeros(2 + len(number) * _LINE, dtype=torch.int64)
        lines = sums[2:].view(-1, _LINE)
        sums[:2] = self.flat_bytes
        for table in self.tables:
            sums[0] += table.header_bytes
            sums[1] += table.live_bytes
            line = lines[number[table.path]]
            if table.row0 == 0:
                line[: len(Tier)] += torch.tensor([table.record_bytes(tier) for tier in Tier])
            if table.col0 == 0:
                line[len(Tier) :] += self.backend.histogram(table).cpu()
        if self._all_reduce is not None:
            sums = self._all_reduce(sums)
        lines = sums[2:].view(-1, _LINE)
        return _Census(int(sums[0]), int(sums[1]), lines[:, : len(Tier)], lines[:, len(Tier) :])

    def _table_rows(self, table: TableTierPlan, number: int, census: _Census) -> TableRows:
        row_bytes = census.row_bytes[number].tolist()
        levels = tuple(row_bytes[tier] for tier in table.levels)
        return TableRows(census.histograms[number], table.levels, levels, self.factors.get(table.path, 1.0))

    def _entering_bytes(self, table: TableTierPlan, number: int, census: _Census) -> int:
        entered = int(census.histograms[number].sum())
        ahead = next_due(self.step, self.config.rebalance_every) - self.step
        expected = min(table.rows - entered, math.ceil(entered * ahead / max(self.step, 1)))
        return expected * int(census.row_bytes[number, table.levels[0]])


def is_due(step: int, every: int) -> bool:
    """Whether thresholds are chosen after ``step``: after 1, 2, 4, ... and every multiple of ``every``."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def next_due(step: int, every: int) -> int:
    """The first step after ``step`` that is due."""
    return next(later for later in range(step + 1, step + every + 1) if is_due(later, every))
