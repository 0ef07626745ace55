"""The contract of a backend: what a lookup and an update do, to the last bit.

All arithmetic is fp32, one rounding after each operation (no fused multiply-add), in the order written here.

**Lookup.** A bag's vector is 0 + c x_1 + c x_2 + ... in the order of its ids, where x_i is the row (int8, int4:
``scale * q``), multiplied by the id's weight if there are weights; for MEAN the sum is multiplied by
``inv = 1 / length`` at the end; an empty bag is 0. A NONE row reads its initial values, a DROPPED row and id -1 zeros.

**Update.** For each table and each row r with occurrences i_1 < i_2 < ... (positions in ``Bags.ids``, all features of
the table together, merged before the optimizer), with coefficient c_i = weight (1 without weights), for MEAN
``weight * inv``:

    g    = 0 + c_1 * G[bag of i_1] + c_2 * G[bag of i_2] + ...      (c = 1: no multiplication)
    inc  = 0 + w[sample of i_1] + w[sample of i_2] + ...            sample = number of the bag within its feature;
                                                                    w = importance, 1 where there is none
    x, state -> rule(x, state, g)                                   (``rules.py``)
    priority = stat[r, 1] + (rule.priority_gain * inc)

Sums over the columns of a row (row-wise Adagrad and Adam, gradients of weights) have 16 partial sums, column j going to
number j mod 16 in ascending order, added up pairwise: s_k + s_{k+8}, then +4, +2, +1. The widest shard that TorchRec
makes is a whole row.

**Storing** (tiered tables). ``tier`` = the row's tier, or ``entry`` for a NONE row; ``wanted`` = the highest level t
with priority > ``rule.promote_above[t]``, at least ``tier``. The row is encoded (``rounding.py``) in ``wanted``, with
the rounding streams of generator.py; int8 and int4 rows keep their scale s if the tier does not change and absmax(x)
lies within [(0.5 * levels) * s, levels * s], else s = absmax / levels. If ``wanted`` has no free slot, the row stays in
``tier``, and this is counted. Slots are given in ascending order of (table, row); those that rows leave are free when
the update has ended, not before. A DROPPED row that stays DROPPED keeps only scalar and priority; its x and state
vectors count as 0 in an update.

Occurrences with gradients that are not finite stop the update with :class:`BadGradient`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thresher.embeddings.kernels.bags import Bags
from thresher.embeddings.kernels.rules import UpdateRule
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

Table = FlatTable | TieredTable

HISTOGRAM_BUCKETS = 512
HISTOGRAM_BASE = (127 - 40) << 3
"""Bucket of a priority p (fp32, p = stat[r, 1] / gain): (bits(p) >> 20) - HISTOGRAM_BASE, within 0..511: eight to an
octave, from 2^-40 to 2^24."""


@dataclass(frozen=True)
class Sorted:
    """The distinct rows of a lookup, found once and used by the update.

    Attributes:
        bags: the lookup.
        unique: for each table the distinct rows [U] int64 that are read, ascending, without -1.
        handle: what else the backend needs.
    """

    bags: Bags
    unique: tuple[Tensor, ...]
    handle: Any


@dataclass(frozen=True)
class UpdateStats:
    """What an update did, over all its tables.

    Attributes:
        rows: distinct rows updated.
        promoted: rows that moved to a higher tier (first updates of NONE rows not counted).
        refused: rows that should have moved but found no free slot.
    """

    rows: int = 0
    promoted: int = 0
    refused: int = 0


class Backend(Protocol):
    """Looks rows up and updates them. Tables of one call are on one device; none is given twice."""

    name: str

    def sort(self, tables: Sequence[Table], bags: Bags) -> Sorted:
        """Checks that every id is a row of its table and every offset in order, and finds the distinct rows.

        Raises:
            BadIds: names the first feature, position and id at fault, in the order of ``bags.ids``.
        """
        ...

    def lookup(self, tables: Sequence[Table], bags: Bags, checked: Sorted | None = None) -> Tensor:
        """fp32 output as ``Bags`` describes. Checks ids itself where ``checked`` is None. Changes nothing.

        Raises:
            BadIds: as :meth:`sort`.
        """
        ...

    def weight_gradient(self, tables: Sequence[Table], bags: Bags, grad: Tensor) -> Tensor:
        """[n] fp32: gradient with respect to ``bags.weights``, from the rows as they are (call before ``update``).

        The sum over the columns of gradient x row, for MEAN times ``inv`` at the end.
        """
        ...

    def row_sums(
        self, tables: Sequence[Table], found: Sorted, grad: Tensor, rules: Sequence[UpdateRule]
    ) -> list[Tensor]:
        """For each table [U] fp32: the sum over this shard's columns of squares of g (L2 decay included)."""
        ...

    def update(
        self,
        tables: Sequence[Table],
        found: Sorted,
        grad: Tensor,
        rules: Sequence[UpdateRule],
        importance: Tensor | None = None,
        row_sums: Sequence[Tensor] | None = None,
    ) -> UpdateStats:
        """Applies ``grad`` (shape of the output) to the distinct rows; one rule a table. ``table.step`` is not changed.

        Args:
            importance: [B] fp32, weight of each sample in the priorities; None for ones.
            row_sums: for each table the sums of squares over all columns of the *whole* rows, in place of this
                shard's (column shards of row-wise optimizers).

        Raises:
            BadGradient: a gradient is not finite; names table and row. Rows before it may have been updated.
        """
        ...

    def read(self, table: Table, rows: Tensor) -> Tensor:
        """[n, dim] fp32 values of ``rows`` [n] int64."""
        ...

    def write(self, table: TieredTable, rows: Tensor, values: Tensor, tiers: Tensor) -> None:
        """Stores ``values`` [n, dim] fp32 in the given tiers ([n] int64, levels of the table or NONE).

        Rounds to nearest with fresh scales. State vectors of the rows become 0, scalars and priorities stay. Rows are
        distinct. Slots that rows leave are free at once.

        Raises:
            PlanError: a tier has too few slots.
        """
        ...

    def histogram(self, table: TieredTable) -> Tensor:
        """[512] int64: rows that are not NONE by bucket of their priority."""
        ...

    def demote(self, table: TieredTable, first: int, count: int, keep_from: Sequence[float]) -> int:
        """Lowers rows ``first`` .. ``first + count - 1``: while stat[r, 1] < keep_from[tier] and there is a lower
        level, a row goes to the next lower level. Encodes once, in the last one, with streams ``DEMOTED`` + s, fresh
        scale. A row whose last level has no free slot stays where it is. Returns how many rows moved.

        Args:
            keep_from: by number of the tier (6 values), already multiplied by the gain.
        """
        ...

    def compact(self, table: TieredTable, tier: Tier) -> None:
        """Moves records so that slots 0 .. live - 1 are in use, empties the free stack, and trims the slab."""
        ...


def pick_backend(device: torch.device) -> Backend:
    """The fastest backend that runs here: ``native`` on CPU, ``triton`` on CUDA, ``reference`` where neither can."""
    from thresher.embeddings.kernels.native.backend import Native
    from thresher.embeddings.kernels.native.library import load
    from thresher.embeddings.kernels.reference import Reference

    if device.type == "cuda":
        from thresher.embeddings.kernels.gpu.backend import TritonBackend

        return TritonBackend()
    library = load() if device.type == "cpu" else None
    return Reference() if library is None else Native(library)
