"""Batches of a prepared split: an endless shuffled stream for training, an ordered sweep for evaluation."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from thresher.data.ahead import Ahead
from thresher.data.batch import Batch
from thresher.data.block import Array, Block, concat
from thresher.data.collate import Collator
from thresher.data.dataset import Dataset
from thresher.data.loader import Ledger, Loader
from thresher.data.order import PLAIN_WINDOW_ROWS, Order
from thresher.data.quarantine import Quarantine
from thresher.errors import ConfigError, DataError

Rows = tuple[Block, Array, int]
"""Rows in memory, the order in which they go into batches, and the epoch they belong to."""


class Reader:
    """Reads one split of a data set for one rank.

    Two threads work ahead of the consumer: one decodes the next window while the current one is served, one makes up
    to ``prefetch`` batches. In memory are at most the window being served, the next one, and the row groups that
    straddle their edges; a split of at most ``window_rows`` rows is decoded once and kept.

    Args:
        dataset: the prepared data.
        split: name of the split.
        batch_size: rows of a batch of this rank.
        rank, world: this rank takes the stream's positions p with p % world == rank.
        seed: of the order (see :mod:`thresher.data.order`).
        shuffle: False streams the rows in the order of the files.
        window_rows: rows shuffled together, over all ranks.
        prefetch: batches made ahead; 0 makes everything in the consumer's thread.
        max_bad_share: share of bad rows above which reading fails; 0 fails on the first. Up to that share a bad row is
            counted, written to ``quarantine`` and replaced in its batch by a copy of a good one of weight 0.
        quarantine: folder for ``quarantine.jsonl`` with file, row, reason and values; one per rank. Needed where
            ``max_bad_share`` is above 0. A resumed run may list a row again.

    Raises:
        DataError: there is no such split, or it has no rows.
        ConfigError: an argument does not make sense.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        window_rows: int = 1 << 19,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        prefetch: int = 4,
        max_bad_share: float = 0.0,
        quarantine: Path | None = None,
    ) -> None:
        self._split = dataset.split(split)
        self._schema = dataset.schema
        self.rows = self._split.rows
        _check(split, self.rows, rank, world, {"batch_size": batch_size, "window_rows": window_rows})
        self._size, self._rank, self._world, self._prefetch = batch_size, rank, world, prefetch
        groups = [rows for part in self._split.parts for rows in part.groups]
        self._order = Order(groups, seed, window_rows, shuffle)
        self._plain = Order(groups, seed, window_rows, shuffle=False)
        self._sweep_rows = min(window_rows, PLAIN_WINDOW_ROWS)
        self._ledger = Ledger(split, _quarantine(max_bad_share, quarantine))
        self._collator = Collator(self._schema, batch_size)
        self._running: weakref.WeakSet[Ahead[Batch]] = weakref.WeakSet()

    @property
    def bad_rows(self) -> int:
        """Distinct bad rows this reader has met."""
        return self._ledger.bad_rows

    def stream(self, cursor: int) -> Iterator[Batch]:
        """Training batches without end.

        Args:
            cursor: samples consumed by all ranks since the beginning of the run, >= 0.

        Raises:
            DataError, SchemaError, BadBatch: from ``next``, when a file or a row is found to be bad.
        """
        return self._run(lambda: self._training(cursor))

    def sweep(self, max_rows: int = 0) -> Iterator[Batch]:
        """Each row once, in order; rank r takes the r-th of ``world`` equal stretches.

        Every rank yields the same number of batches of full size; samples of weight 0 fill them up.

        Args:
            max_rows: stop after so many rows of the split, over all ranks; 0 for all.

        Raises:
            DataError, SchemaError, BadBatch: from ``next``, when a file or a row is found to be bad.
        """
        rows = min(max_rows or self.rows, self.rows)
        return self._run(lambda: self._sweeping(rows))

    def close(self) -> None:
        """Ends the threads of all iterators of this reader."""
        for running in list(self._running):
            running.close()

    def _run(self, windows: Callable[[], Iterator[Rows]]) -> Iterator[Batch]:
        size, collator, prefetch = self._size, self._collator, self._prefetch
        if prefetch == 0:
            return _batches(windows(), size, collator)
        ahead = Ahead(lambda: _batches(Ahead(windows, 1), size, collator), prefetch)
        self._running.add(ahead)
        return ahead

    def _training(self, cursor: int) -> Iterator[Rows]:
        loader = Loader(self._split, self._schema, self._ledger)
        kept: Block | None = None
        while True:
            epoch, index = divmod(cursor, self.rows)
            window = self._order.window(epoch, index, (self._rank - epoch * self.rows) % self._world, self._world)
            cursor = epoch * self.rows + window.stop
            if len(window.take):
                block = kept or loader.load(window.ranges)
                kept = block if self._order.whole else None
                yield block, window.take, epoch
            if window.stop == self.rows:
                self._ledger.check()

    def _sweeping(self, rows: int) -> Iterator[Rows]:
        loader = Loader(self._split, self._schema, self._ledger)
        share = -(-rows // self._world)
        start, stop = (min(rank * share, rows) for rank in (self._rank, self._rank + 1))
        end = start + -(-share // self._size) * self._size
        for at in range(start, end, self._sweep_rows):
            first = min(at, rows - 1)
            last = max(first + 1, min(at + self._sweep_rows, stop))
            block = loader.load(self._plain.ranges(0, first, last - first))
            yield *_padded(block, min(self._sweep_rows, end - at), stop - at), 0
        self._ledger.check()


def _batches(windows: Iterator[Rows], size: int, collator: Collator) -> Iterator[Batch]:
    """Cuts a sequence of windows into batches of ``size`` rows."""
    parts: list[tuple[Block, int]] = []
    missing = size
    for block, order, epoch in windows:
        at = 0
        while at < len(order):
            part = block.take(order[at : at + missing])
            parts.append((part, epoch))
            at, missing = at + part.rows, missing - part.rows
            if missing == 0:
                epochs = np.concatenate([np.full(part.rows, epoch) for part, epoch in parts])
                yield collator.batch(concat([part for part, _ in parts], size), epochs)
                parts, missing = [], size


def _padded(block: Block, rows: int, real: int) -> tuple[Block, Array]:
    """An order of ``rows`` rows, of which those from ``real`` on repeat the block's last and are void."""
    order = np.arange(rows)
    if real >= rows:
        return block, order
    longer = block.take(np.minimum(order, block.rows - 1))
    return replace(longer, void=longer.void | (order >= real)), order


def _check(split: str, rows: int, rank: int, world: int, positive: dict[str, int]) -> None:
    if rows == 0:
        raise DataError(f"split '{split}' has no rows", fix="check the recipe's splits")
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is outside 0..{world - 1}", fix="give a rank below the number of ranks")
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}", where=f"reader of split '{split}'", fix="give 1 or more")


def _quarantine(max_bad_share: float, folder: Path | None) -> Quarantine | None:
    if max_bad_share == 0:
        return None
    if folder is None:
        raise ConfigError(
            f"max_bad_share is {max_bad_share}, but there is no folder for the bad rows",
            fix="give a quarantine folder, or set max_bad_share to 0",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return Quarantine(folder, max_bad_share)
