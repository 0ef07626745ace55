"""Tables on a GPU: the contract of ``kernels/backend.py`` in Triton."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import Sorted, Table, UpdateStats
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.checks import bad_gradient
from thresher.embeddings.kernels.gpu import lookup, maintain
from thresher.embeddings.kernels.gpu.gradients import gradients_of, sums_of_squares
from thresher.embeddings.kernels.gpu.kernel import TILE
from thresher.embeddings.kernels.gpu.layout import counts_of, settle
from thresher.embeddings.kernels.gpu.rules import constants_of
from thresher.embeddings.kernels.gpu.slots import by_tier
from thresher.embeddings.kernels.gpu.sort import Runs, looked_up, sorted_runs
from thresher.embeddings.kernels.gpu.update import stats_of, update_rows
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.kernels.rules import UpdateRule
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

PIECE = 256
"""Occurrences of a row that one program adds up one after the other."""


class TritonBackend:
    """See :class:`thresher.embeddings.kernels.backend.Backend`; on CUDA.

    Does what the contract says to the last bit, with one exception: a row that occurs more than ``piece`` times in an
    update has its gradient (and its increase of priority, with importances) summed in pieces of that many occurrences,
    and the pieces' sums then added in order. The result depends on nothing else, so it is the same in every run and
    however tables are cut, but its last bits differ from those of other backends.

    Args:
        piece: a larger one keeps to the contract for longer runs, at the cost of time where a row is very frequent.
        tile: numbers (rows x columns) that a program handles at once; a power of two. Changes no result.
    """

    name = "triton"

    def __init__(self, piece: int = PIECE, tile: int = TILE) -> None:
        self._piece, self._tile, self._plain = piece, tile, Reference()

    @torch.no_grad()
    def sort(self, tables: Sequence[Table], bags: Bags) -> Sorted:
        """See the contract."""
        runs = sorted_runs(tables, bags, self._piece, self._tile)
        return Sorted(bags, tuple(runs.per_table(runs.row)), runs)

    @torch.no_grad()
    def lookup(self, tables: Sequence[Table], bags: Bags, checked: Sorted | None = None) -> Tensor:
        """See the contract."""
        layout, places = (
            looked_up(tables, bags, self._tile) if checked is None else (checked.handle.layout, checked.handle.places)
        )
        return lookup.pooled(layout, bags, places)

    @torch.no_grad()
    def weight_gradient(self, tables: Sequence[Table], bags: Bags, grad: Tensor) -> Tensor:
        """See the contract."""
        layout, places = looked_up(tables, bags, self._tile)
        return lookup.weight_gradient(layout, bags, places, grad.contiguous())

    @torch.no_grad()
    def row_sums(
        self, tables: Sequence[Table], found: Sorted, grad: Tensor, rules: Sequence[UpdateRule]
    ) -> list[Tensor]:
        """See the contract."""
        runs: Runs = found.handle
        return runs.per_table(sums_of_squares(gradients_of(runs, grad), constants_of(rules, grad.device)))

    @torch.no_grad()
    def update(
        self,
        tables: Sequence[Table],
        found: Sorted,
        grad: Tensor,
        rules: Sequence[UpdateRule],
        importance: Tensor | None = None,
        row_sums: Sequence[Tensor] | None = None,
    ) -> UpdateStats:
        """See the contract; rows whose gradient is not finite stay as they are, all others are updated."""
        gradients = gradients_of(found.handle, grad)
        sums = None if row_sums is None else torch.cat(list(row_sums))
        constants = constants_of(rules, grad.device)
        done = update_rows(gradients, rules, constants, counts_of(tables), importance, sums)
        taken, freed = by_tier(done.taken, len(tables)), by_tier(done.freed, len(tables))
        for table, took, gave in zip(tables, taken, freed, strict=True):
            if isinstance(table, TieredTable):
                settle(table, took, gave)
        if done.bad >= 0:
            runs: Runs = found.handle
            raise bad_gradient(tables[int(runs.table[done.bad])], int(runs.row[done.bad]))
        return stats_of(gradients, done)

    @torch.no_grad()
    def read(self, table: Table, rows: Tensor) -> Tensor:
        """See the contract; rows of -1 read zeros."""
        offsets = torch.arange(rows.numel() + 1, device=rows.device)
        bags = Bags(rows, offsets, None, (0,), (rows.numel(),), Pooling.NONE)
        return self.lookup([table], bags)

    def write(self, table: TieredTable, rows: Tensor, values: Tensor, tiers: Tensor) -> None:
        """See the contract."""
        self._plain.write(table, rows, values, tiers)

    def histogram(self, table: TieredTable) -> Tensor:
        """See the contract."""
        return self._plain.histogram(table)

    @torch.no_grad()
    def demote(self, table: TieredTable, first: int, count: int, keep_from: Sequence[float]) -> int:
        """See the contract."""
        return maintain.demote_rows(table, first, count, keep_from, self._tile)

    def compact(self, table: TieredTable, tier: Tier) -> None:
        """See the contract."""
        self._plain.compact(table, tier)
