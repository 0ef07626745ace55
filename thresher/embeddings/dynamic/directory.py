"""Which row belongs to which id: admission by frequency, eviction, growth.

One step, for the distinct ids of a lookup in ascending order, with the number of their occurrences:

    1. known ids are marked as used at this step
    2. every ``sweep_every`` steps, ids unused for more than ``ttl_steps`` steps lose their rows
    3. occurrences of unknown ids are added up; those that reach ``min_count`` ask for a row, the most frequent first
       (equal ones by ascending id)
    4. where rows do not suffice, ids unused for more than ``ttl_steps`` lose theirs; if that is not enough, so do those
       that ``evict`` names, at least ``evict_share`` of all rows at once, none of them used at this step
    5. rows are given out: those freed last first, then new ones. Who gets none is counted as refused, and asks again at
       its next occurrence
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.dynamic.id_map import ABSENT, IdMap, Ids

NEVER_USED = -1


@dataclass
class Counts:
    """What a directory did since it was made.

    Attributes:
        admitted: rows given out.
        evicted: rows taken back because rows ran out.
        expired: rows taken back because of their age.
        refused: requests for a row when there was none.
        forgotten: ids whose count of occurrences was dropped before admission.
    """

    admitted: int = 0
    evicted: int = 0
    expired: int = 0
    refused: int = 0
    forgotten: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {field.name: int(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class Admission:
    """The outcome of a step.

    Attributes:
        rows: [n] int64, the row of each id; -1 for none.
        freed: rows whose ids lost them, ascending; some of them belong to other ids already.
    """

    rows: Ids
    freed: Ids


class IdDirectory:
    """The ids of one table shard.

    Args:
        identity: [capacity] int64; the id of each row is written there. Its length is the most rows there may be.
        new_map: makes the maps that are needed.

    Attributes:
        counts: what happened so far.
        step: lookups that trained.
        high: rows ever given out.
        open_since: the first step whose rows are still to be updated, 0 for none: they are not taken back.
    """

    def __init__(self, config: DynamicTable, identity: Ids, new_map: Callable[[], IdMap]) -> None:
        self.config, self.identity, self.capacity = config, identity, len(identity)
        self.counts = Counts()
        self.step = 0
        self.high = 0
        self.open_since = 0
        self._rows, self._pending, self._new_map = new_map(), new_map(), new_map
        self._used_at = np.full(self.capacity, NEVER_USED, np.int64)
        self._uses = np.zeros(self.capacity, np.int64)
        self._free: Ids = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, ids: Ids) -> Ids:
        """[n] rows of ``ids`` [n]; -1 for those without. Changes nothing."""
        return self._rows.find(ids)

    def admit(self, ids: Ids, priorities: Callable[[], NDArray[np.float32]] | None = None) -> Admission:
        """Does a step for the ids of a lookup, [n] int64 with repetitions.

        Args:
            priorities: gives the priority of every row, for ``evict: priority``.
        """
        self.step += 1
        self.open_since = self.open_since or self.step
        distinct, inverse, occurrences = np.unique(ids, return_inverse=True, return_counts=True)
        rows = self._rows.find(distinct)
        known = rows != ABSENT
        self._used_at[rows[known]] = self.step
        self._uses[rows[known]] += occurrences[known]
        freed = [self._expire()] if self.step % self.config.sweep_every == 0 else []
        asking, totals = self._count(distinct[~known], occurrences[~known])
        freed += self._make_room(len(asking), priorities)
        given = self._give(asking, totals)
        rows[np.searchsorted(distinct, asking[: len(given)])] = given
        self._bound_pending()
        return Admission(rows[inverse.ravel()], np.sort(np.concatenate([*freed, np.empty(0, np.int64)])))

    def close(self) -> None:
        """The rows of all steps so far have been updated."""
        self.open_since = 0

    def _count(self, ids: Ids, occurrences: Ids) -> tuple[Ids, Ids]:
        """Ids that ask for a row with their occurrences so far, the most frequent first."""
        totals = occurrences
        if self.config.min_count > 1:
            totals = occurrences + np.maximum(self._pending.find(ids), 0)
            # Those that ask are kept as well, until they have got a row.
            self._pending.put(ids, totals)
        asks = totals >= self.config.min_count
        order = np.lexsort((ids[asks], -totals[asks]))
        return ids[asks][order], totals[asks][order]

    def _make_room(self, wanted: int, priorities: Callable[[], NDArray[np.float32]] | None) -> list[Ids]:
        if wanted <= self._room():
            return []
        freed = [self._expire()]
        missing = wanted - self._room()
        if missing > 0 and self.config.evict != "none":
            freed.append(self._evict(max(missing, int(self.config.evict_share * self.capacity)), priorities))
        return freed

    def _room(self) -> int:
        return len(self._free) + self.capacity - self.high

    def _expire(self) -> Ids:
        if not self.config.ttl_steps:
            return np.empty(0, np.int64)
        used = self._used_at[: self.high]
        oldest = min(self.step - self.config.ttl_steps, self.open_since or self.step)
        old = np.flatnonzero((used != NEVER_USED) & (used < oldest))
        self.counts.expired += len(old)
        self._take_back(old)
        return old

    def _evict(self, number: int, priorities: Callable[[], NDArray[np.float32]] | None) -> Ids:
        used = self._used_at[: self.high]
        rows = np.flatnonzero((used != NEVER_USED) & (used < (self.open_since or self.step)))
        worth = self._worth(priorities)[rows]
        if number < len(rows):
            least = worth <= np.partition(worth, number)[number]
            rows, worth = rows[least], worth[least]
        # Of equal worth, the smaller id goes first, whatever row it has.
        victims = np.sort(rows[np.lexsort((self.identity[rows], worth))[:number]])
        self.counts.evicted += len(victims)
        self._take_back(victims)
        return victims

    def _worth(self, priorities: Callable[[], NDArray[np.float32]] | None) -> NDArray[np.generic]:
        if self.config.evict == "lru":
            return self._used_at
        if self.config.evict == "lfu":
            return self._uses
        assert priorities is not None, "evict: priority is only accepted for tables with priorities"
        return priorities()

    def _take_back(self, rows: Ids) -> None:
        self._rows.erase(self.identity[rows])
        self._used_at[rows] = NEVER_USED
        self._uses[rows] = 0
        self._free = np.concatenate([self._free, rows])

    def _give(self, ids: Ids, totals: Ids) -> Ids:
        """Rows for as many of ``ids`` as there are rows."""
        number = min(len(ids), self._room())
        reused = self._free[::-1][:number]
        self._free = self._free[: len(self._free) - len(reused)]
        fresh = np.arange(self.high, self.high + number - len(reused))
        self.high += len(fresh)
        rows = np.concatenate([reused, fresh])
        self.identity[rows], self._used_at[rows], self._uses[rows] = ids[:number], self.step, totals[:number]
        self._rows.put(ids[:number], rows)
        if self.config.min_count > 1:
            self._pending.erase(ids[:number])
        self.counts.admitted += number
        self.counts.refused += len(ids) - number
        return rows

    def _bound_pending(self) -> None:
        limit = max(int(self.config.pending_share * self.capacity), 1)
        while len(self._pending) > limit:
            ids, totals = self._pending.items()
            keep = totals >= 2
            self.counts.forgotten += int((~keep).sum())
            self._pending = self._new_map()
            self._pending.put(ids[keep], totals[keep] // 2)

    def state(self) -> dict[str, Ids]:
        """All that a restarted run needs, as arrays; ``load`` takes them back."""
        pending, totals = self._pending.items()
        scalars = np.array([self.step, self.high, *self.counts.as_dict().values()], np.int64)
        rows = slice(0, self.high)
        return {
            "scalars": scalars,
            "ids": self.identity[rows].copy(),
            "used_at": self._used_at[rows].copy(),
            "uses": self._uses[rows].copy(),
            "free": self._free.copy(),
            "pending": pending,
            "pending_counts": totals,
        }

    def load(self, state: dict[str, Ids]) -> None:
        """Becomes what :meth:`state` of a directory of the same capacity described."""
        self.step, self.high, *counts = state["scalars"].tolist()
        self.open_since = 0
        self.counts = Counts(*counts)
        rows = slice(0, self.high)
        self.identity[rows], self._used_at[rows], self._uses[rows] = state["ids"], state["used_at"], state["uses"]
        self._free = state["free"].copy()
        self._rows, self._pending = self._new_map(), self._new_map()
        live = np.flatnonzero(self._used_at[rows] != NEVER_USED)
        self._rows.put(self.identity[live], live)
        self._pending.put(state["pending"], state["pending_counts"])
