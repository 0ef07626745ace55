"""The books: rows and bytes by table and tier, as they are in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import UpdateStats
from thresher.embeddings.policy.plan import TableTierPlan, TierPlan
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

AllReduce: TypeAlias = Callable[[Tensor], Tensor]
"""Sum of an int64 tensor in CPU memory over all ranks. Collective."""
_COLUMNS = len(Tier) + 2


@dataclass(frozen=True)
class Moves:
    """Rows that changed their tier since training started; column shards of a row count each.

    Attributes:
        promoted, demoted: to a higher and to a lower tier.
        refused: that should have been promoted, but found no free slot.
    """

    promoted: int = 0
    demoted: int = 0
    refused: int = 0

    def updated(self, stats: UpdateStats) -> "Moves":
        """With what an update did."""
        return replace(self, promoted=self.promoted + stats.promoted, refused=self.refused + stats.refused)


@dataclass(frozen=True)
class TableBytes:
    """One table with tiers.

    Attributes:
        rows: by number of the tier; each row once, however many column shards it has.
        live_bytes: headers and records of all rows, optimizer state included.
        held_bytes: memory committed for them: free slots count, and pages are whole.
        fp32_bytes: what the whole table would take without tiers.
    """

    path: str
    rows: tuple[int, ...]
    live_bytes: int
    held_bytes: int
    fp32_bytes: int

    @property
    def share(self) -> float:
        """Of the bytes without tiers."""
        return self.live_bytes / self.fp32_bytes


@dataclass(frozen=True)
class Ledger:
    """All tables of one rank, or of all ranks.

    Attributes:
        flat_bytes: of tables without tiers, optimizer state included.
        budget_bytes, fp32_bytes: what all tables may take, and what they would take without tiers.
    """

    tables: tuple[TableBytes, ...]
    flat_bytes: int
    budget_bytes: int
    fp32_bytes: int
    moves: Moves

    @property
    def live_bytes(self) -> int:
        """Bytes in use; what the budget is about."""
        return self.flat_bytes + sum(table.live_bytes for table in self.tables)

    @property
    def held_bytes(self) -> int:
        """Bytes committed."""
        return self.flat_bytes + sum(table.held_bytes for table in self.tables)

    @property
    def share(self) -> float:
        """Of the bytes without tiers."""
        return self.live_bytes / self.fp32_bytes

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of all tables with tiers, by number of the tier."""
        return tuple(sum(table.rows[tier] for table in self.tables) for tier in Tier)


def take_ledger(
    plan: TierPlan, tables: Sequence[TieredTable], flat_bytes: int, moves: Moves, all_reduce: AllReduce | None
) -> Ledger:
    """The ledger of this rank's shards ``tables``; of all ranks with ``all_reduce``. Bytes are those of the tensors."""
    number = {table.path: n for n, table in enumerate(plan.tiered)}
    sums = torch.zeros(len(number) * _COLUMNS + 4, dtype=torch.int64)
    lines = sums[4:].view(-1, _COLUMNS)
    for table in tables:
        if table.col0 == 0:
            lines[number[table.path], : len(Tier)] += torch.tensor(_rows_by_tier(table))
        lines[number[table.path], len(Tier) :] += torch.tensor([table.live_bytes, table.held_bytes])
    sums[:4] = torch.tensor([flat_bytes, moves.promoted, moves.demoted, moves.refused])
    if all_reduce is not None:
        sums = all_reduce(sums)
    found, *counts = sums[:4].tolist()
    rows = sums[4:].view(-1, _COLUMNS).tolist()
    entries = tuple(_entry(table, line) for table, line in zip(plan.tiered, rows, strict=True))
    return Ledger(entries, found, plan.budget_bytes, plan.fp32_bytes, Moves(*counts))


def _entry(table: TableTierPlan, line: Sequence[int]) -> TableBytes:
    rows, (live, held) = line[: len(Tier)], line[len(Tier) :]
    return TableBytes(table.path, tuple(rows), live, held, table.fp32_bytes)


def _rows_by_tier(table: TieredTable) -> list[int]:
    """Only dropped rows are counted one by one; tiers with records know how many they hold."""
    counts = [0] * len(Tier)
    for tier in table.stored_levels:
        counts[tier] = table.live(tier)
    if Tier.DROPPED in table.levels:
        counts[Tier.DROPPED] = int((table.tier_of() == Tier.DROPPED).sum())
    counts[Tier.NONE] = table.rows - sum(counts)
    return counts
