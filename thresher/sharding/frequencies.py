"""How often the rows of tables are looked up: measured on batches, used to place tables and to cut them by rows."""

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torchrec import KeyedJaggedTensor

from thresher.embeddings.tables import TableInfo
from thresher.settings import Settings

BLOCKS = 1024
"""Equal ranges of rows whose lookups are counted together."""
HEAD = 0.01


class Frequency(Settings):
    """Lookups of one table.

    Attributes:
        lookups: a sample's on average, for each feature that reads the table.
        distinct: distinct rows of a batch, as a share of its lookups.
        head: share of the lookups that the most frequent 1 % of the rows get (at least one row).
        blocks: share of the lookups in each of up to 1,024 ranges of rows of equal size, in order.
    """

    lookups: tuple[Annotated[float, Field(ge=0)], ...]
    distinct: float = Field(ge=0, le=1)
    head: float = Field(ge=0, le=1)
    blocks: tuple[Annotated[float, Field(ge=0)], ...]

    def share(self, row0: int, rows: int, of: int) -> float:
        """Share of the lookups that fall to ``rows`` rows from ``row0`` on, of ``of`` in all."""
        first, last = row0 * len(self.blocks) / of, (row0 + rows) * len(self.blocks) / of
        return sum(
            part * (min(number + 1, last) - max(number, first))
            for number, part in enumerate(self.blocks)
            if number + 1 > first and number < last
        )


def measure_frequencies(batches: Iterable[KeyedJaggedTensor], tables: Sequence[TableInfo]) -> dict[str, Frequency]:
    """Counts the ids of ``batches``; one entry for each table of which they hold any lookup, by its path.

    Features that the batches do not have count as read by nobody: a model may make ids of its own.
    """
    counters = {info.path: _Counter(info) for info in tables}
    for batch in batches:
        for counter in counters.values():
            counter.add(batch)
    return {path: counter.result() for path, counter in counters.items() if counter.ids}


class _Counter:
    def __init__(self, info: TableInfo) -> None:
        self._info = info
        self._lookups = [0] * len(info.features)
        self._samples = self._distinct = 0
        self.ids: list[Tensor] = []

    def add(self, batch: KeyedJaggedTensor) -> None:
        keys = batch.keys()
        found = [(n, batch[key].values()) for n, key in enumerate(self._info.features) if key in keys]
        for number, values in found:
            self._lookups[number] += values.numel()
        self._samples += batch.stride()
        read = [values for _, values in found if values.numel()]
        if read:
            rows, counts = torch.unique(torch.cat(read), return_counts=True)
            self._distinct += rows.numel()
            self.ids.append(torch.stack([rows, counts]))

    def result(self) -> Frequency:
        rows, counts = torch.cat(self.ids, dim=1)
        rows, positions = torch.unique(rows, return_inverse=True)
        totals = torch.zeros(rows.numel(), dtype=torch.int64).index_add_(0, positions, counts)
        all_lookups = int(totals.sum())
        blocks = min(BLOCKS, self._info.rows)
        by_block = torch.zeros(blocks, dtype=torch.int64).index_add_(0, rows * blocks // self._info.rows, totals)
        head = totals.topk(min(max(int(HEAD * self._info.rows), 1), totals.numel())).values.sum()
        return Frequency(
            lookups=tuple(count / self._samples for count in self._lookups),
            distinct=self._distinct / all_lookups,
            head=int(head) / all_lookups,
            blocks=tuple((by_block / all_lookups).tolist()),
        )
