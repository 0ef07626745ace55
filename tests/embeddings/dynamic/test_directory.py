"""The directory of a dynamic table against a plain model of what its documentation says."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.dynamic.directory import IdDirectory
from thresher.embeddings.dynamic.id_map import DictMap
from thresher.embeddings.dynamic.native_map import native_maps

HUGE = (1 << 63) - 1
ids_of_a_step = st.lists(
    st.one_of(st.integers(0, 12), st.sampled_from([-1, -HUGE, HUGE, HUGE - 1, 1 << 40])), max_size=9
)
tables = st.builds(
    DynamicTable,
    min_count=st.integers(1, 3),
    evict=st.sampled_from(["lru", "lfu", "priority", "none"]),
    evict_share=st.sampled_from([0.01, 0.5, 1.0]),
    ttl_steps=st.integers(0, 4),
    sweep_every=st.integers(1, 3),
    pending_share=st.sampled_from([0.5, 1.0, 4.0]),
)


class Model:
    """One id at a time, nothing clever."""

    def __init__(self, config: DynamicTable, capacity: int) -> None:
        self.config, self.capacity, self.step, self.high = config, capacity, 0, 0
        self.row: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.uses: Counter[int] = Counter()
        self.pending: Counter[int] = Counter()
        self.free: list[int] = []
        self.refused = self.evicted = self.expired = self.forgotten = 0

    def drop(self, ids: list[int]) -> None:
        for row, key in sorted((self.row[key], key) for key in ids):
            del self.row[key], self.used[key], self.uses[key]
            self.free.append(row)

    def expire(self) -> None:
        if self.config.ttl_steps:
            old = [key for key, step in self.used.items() if step < self.step - self.config.ttl_steps]
            self.expired += len(old)
            self.drop(old)

    def admit(self, ids: list[int], priorities: Any) -> list[int]:
        self.step += 1
        occurrences = Counter(ids)
        for key in occurrences:
            if key in self.row:
                self.used[key], self.uses[key] = self.step, self.uses[key] + occurrences[key]
        if self.step % self.config.sweep_every == 0:
            self.expire()
        asking = []
        for key in sorted(occurrences):
            if key not in self.row:
                total = occurrences[key] + (self.pending[key] if self.config.min_count > 1 else 0)
                self.pending[key] = total
                if total >= self.config.min_count:
                    asking.append((-total, key))
        missing = len(asking) - len(self.free) - (self.capacity - self.high)
        if missing > 0:
            self.expire()
            missing = len(asking) - len(self.free) - (self.capacity - self.high)
            if missing > 0 and self.config.evict != "none":
                number = max(missing, int(self.config.evict_share * self.capacity))
                worth = {"lru": self.used.__getitem__, "lfu": self.uses.__getitem__}.get(
                    self.config.evict, lambda key: priorities[self.row[key]]
                )
                idle = sorted((worth(key), key) for key in self.row if self.used[key] < self.step)[:number]
                self.evicted += len(idle)
                self.drop([key for _, key in idle])
        for negative, key in sorted(asking):
            if self.free:
                self.row[key] = self.free.pop()
            elif self.high < self.capacity:
                self.row[key], self.high = self.high, self.high + 1
            else:
                self.refused += 1
                continue
            self.used[key], self.uses[key] = self.step, -negative
            del self.pending[key]
        if self.config.min_count == 1:
            self.pending.clear()
        while len(self.pending) > max(int(self.config.pending_share * self.capacity), 1):
            halved = Counter({key: total // 2 for key, total in self.pending.items() if total >= 2})
            self.forgotten += len(self.pending) - len(halved)
            self.pending = halved
        return [self.row.get(key, -1) for key in ids]


def check(maps: Any, config: DynamicTable, capacity: int, steps: list[list[int]]) -> None:
    directory = IdDirectory(config, np.zeros(capacity, np.int64), maps)
    model = Model(config, capacity)
    for number, ids in enumerate(steps):
        priorities = np.random.default_rng(number).random(capacity).astype(np.float32)
        before = dict(model.row)
        admission = directory.admit(np.array(ids, np.int64), lambda found=priorities: found)
        assert admission.rows.tolist() == model.admit(ids, priorities)
        lost = {row for key, row in before.items() if model.row.get(key) != row}
        assert set(admission.freed.tolist()) == lost
        assert {int(directory.identity[row]): row for row in model.row.values()} == model.row
        directory.close()
        if number % 3 == 2:
            again = IdDirectory(config, np.zeros(capacity, np.int64), maps)
            again.load(directory.state())
            directory = again
    counts = directory.counts
    assert (counts.refused, counts.evicted, counts.expired, counts.forgotten) == (
        model.refused,
        model.evicted,
        model.expired,
        model.forgotten,
    )
    assert counts.admitted - counts.evicted - counts.expired == len(directory) == len(model.row)
    assert directory.find(np.array([5, HUGE], np.int64)).tolist() == [model.row.get(5, -1), model.row.get(HUGE, -1)]


MAPS = [DictMap] + ([native_maps()] if native_maps() is not None else [])


@pytest.mark.parametrize("maps", MAPS)
@settings(max_examples=150, deadline=None)
@given(config=tables, capacity=st.integers(1, 7), steps=st.lists(ids_of_a_step, max_size=12))
def test_follows_the_model(maps: Any, config: DynamicTable, capacity: int, steps: list[list[int]]) -> None:
    check(maps, config, capacity, steps)


@pytest.mark.slow
@pytest.mark.parametrize("maps", MAPS)
@settings(max_examples=3000, deadline=None)
@given(config=tables, capacity=st.integers(1, 7), steps=st.lists(ids_of_a_step, max_size=30))
def test_follows_the_model_for_long(maps: Any, config: DynamicTable, capacity: int, steps: list[list[int]]) -> None:
    check(maps, config, capacity, steps)


def test_a_full_table_that_evicts_nobody_says_how_many_it_refused() -> None:
    directory = IdDirectory(DynamicTable(evict="none"), np.zeros(2, np.int64), DictMap)
    assert directory.admit(np.array([9, 8, 9, 7])).rows.tolist() == [0, -1, 0, 1]
    assert directory.counts.refused == 1


def test_rows_that_wait_for_their_update_are_not_taken_back() -> None:
    directory = IdDirectory(DynamicTable(ttl_steps=1, sweep_every=1), np.zeros(2, np.int64), DictMap)
    assert directory.admit(np.array([1, 2])).rows.tolist() == [0, 1]
    assert directory.admit(np.array([3])).rows.tolist() == [-1]
    assert directory.admit(np.array([3])).rows.tolist() == [-1]
    directory.close()
    assert directory.admit(np.array([3])).rows.tolist() != [-1]
