"""Raw ids of a lookup turned into rows, before the kernels see them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thresher.embeddings.dynamic.directory import IdDirectory
from thresher.embeddings.kernels.backend import Backend, Table
from thresher.embeddings.kernels.bags import Bags
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier


@dataclass(frozen=True)
class RowCut:
    """How TorchRec's row-wise distribution wrote the ids that it sent here.

    It sends id i, taken as an unsigned number, to shard i / block as i mod block if it is below block x shards, and to
    shard i mod shards as i / shards if it is not. The two can be told apart and undone, for every 64-bit id.

    Attributes:
        shard: number of this shard.
        shards: how many there are.
        block: rows of a shard (the last one may have fewer).
    """

    shard: int = 0
    shards: int = 1
    block: int = 0

    def raw(self, local: Tensor) -> Tensor:
        """The raw ids of ``local`` [n] int64."""
        if self.shards == 1:
            return local
        near = (local >= 0) & (local < self.block)
        return torch.where(near, local + self.shard * self.block, local * self.shards + self.shard)


class DynamicRows:
    """Gives rows to the ids of dynamic tables.

    Args:
        tables: of a group.
        directories: by number of the table; each writes into its table's ``identity``.
        cuts: by number of the table, how its ids were written; where not given, they are raw.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        directories: Mapping[int, IdDirectory],
        backend: Backend,
        cuts: Mapping[int, RowCut] | None = None,
    ) -> None:
        self.directories = dict(directories)
        self._tables, self._backend, self._cuts = tables, backend, dict(cuts or {})

    def translate(self, bags: Bags, training: bool) -> Bags:
        """The same bags with row numbers in place of the ids of dynamic tables; -1 for ids without a row.

        Training admits and evicts ids; a row that changes hands starts again from the initial values of its new id.
        """
        ids = bags.ids.to(torch.int64, copy=True)
        for number, directory in self.directories.items():
            parts = _parts(bags, number)
            cut = self._cuts.get(number, RowCut())
            raw = cut.raw(torch.cat([ids[part] for part in parts])).cpu().numpy()
            rows = torch.from_numpy(self._admit(number, directory, raw) if training else directory.find(raw))
            start = 0
            for part in parts:
                stop = start + part.stop - part.start
                ids[part] = rows[start:stop].to(ids.device)
                start = stop
        return replace(bags, ids=ids)

    def close(self) -> None:
        """The rows of all lookups so far have been updated."""
        for directory in self.directories.values():
            directory.close()

    def _admit(self, number: int, directory: IdDirectory, raw: NDArray[np.int64]) -> NDArray[np.int64]:
        table = self._tables[number]
        assert isinstance(table, TieredTable), "dynamic tables are tiered tables"
        admission = directory.admit(raw, lambda: table.stat[:, 1].cpu().numpy())
        if len(admission.freed):
            rows = torch.from_numpy(admission.freed).to(table.device)
            none = torch.full_like(rows, int(Tier.NONE))
            self._backend.write(table, rows, torch.zeros(len(rows), table.dim, device=table.device), none)
            table.stat[rows] = 0
        return admission.rows


def _parts(bags: Bags, table: int) -> list[slice]:
    """Where the ids of a table stand."""
    firsts = bags.offsets[torch.tensor(bags.first_bags)].tolist()
    return [slice(firsts[f], firsts[f + 1]) for f, read in enumerate(bags.tables) if read == table]
