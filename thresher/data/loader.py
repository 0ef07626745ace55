"""Row groups of a split as blocks: files opened once, groups decoded once, bad rows settled."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from thresher.data.block import Block, concat
from thresher.data.columns import check_columns, columns_of
from thresher.data.dataset import AGAIN, Split
from thresher.data.decode import Decoder, Fault, by_row
from thresher.data.quarantine import BadRow, Quarantine
from thresher.data.schema import Schema
from thresher.errors import BadBatch, DataError

OPEN_FILES = 128


class Ledger:
    """Counts bad rows of a split, each once however often its row group is read.

    Args:
        split: name of the split, for messages.
        quarantine: where bad rows are written; None when the first one is fatal.
    """

    def __init__(self, split: str, quarantine: Quarantine | None) -> None:
        self._split, self._quarantine = split, quarantine
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    @property
    def bad_rows(self) -> int:
        """Distinct bad rows met so far."""
        return self._quarantine.bad if self._quarantine else 0

    def settle(self, group: int, block: Block, faults: Sequence[Fault], table: pa.Table, place: "Place") -> None:
        """Records the faults of a row group when it is met for the first time.

        Raises:
            BadBatch: a row is bad and none may be, or too many are.
        """
        reasons = by_row(faults)
        if self._quarantine is None:
            for row, reason in reasons.items():
                where = f"row {int(block.numbers[row])} of split '{self._split}'"
                raise BadBatch(
                    f"{reason.format(place=where)} (file {place.path.name}, row {place.first + row})",
                    fix="mend the data, or set max_bad_share to leave such rows out",
                )
            return
        with self._lock:
            if group in self._seen:
                return
            self._seen.add(group)
            self._quarantine.add(block.rows, [_bad_row(row, reason, table, place) for row, reason in reasons.items()])

    def check(self) -> None:
        """Fails if too many rows are bad; for the end of a pass, since few rows do not tell before.

        Raises:
            BadBatch: names the first bad row, the share and the limit.
        """
        if self._quarantine is not None:
            self._quarantine.check()


class Place:
    """Where a row group stands: file, number of the group in it, number of its first row in it and in the split."""

    def __init__(self, path: Path, group: int, first: int, number: int) -> None:
        self.path, self.group, self.first, self.number = path, group, first, number


def places(split: Split) -> list[Place]:
    """The row groups of a split, in order."""
    found, number = [], 0
    for path, part in zip(split.paths, split.parts, strict=True):
        first = 0
        for group, rows in enumerate(part.groups):
            found.append(Place(path, group, first, number))
            first, number = first + rows, number + rows
    return found


class Loader:
    """Reads ranges of row groups; one per iterator, not shared between threads.

    A row group of which a range takes the beginning only is kept for the next call, which takes the rest.

    Args:
        split: the files.
        schema: what they must hold.
        ledger: settles bad rows.
    """

    def __init__(self, split: Split, schema: Schema, ledger: Ledger) -> None:
        self._ledger = ledger
        self._places = places(split)
        self._groups = {path: part.groups for path, part in zip(split.paths, split.parts, strict=True)}
        self._columns = columns_of(schema)
        self._decoder = Decoder(self._columns)
        self._files: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._kept: dict[int, Block] = {}

    def load(self, ranges: Sequence[tuple[int, int, int]]) -> Block:
        """The rows of (row group, first row, row behind the last), one range after the other; at least one row.

        Raises:
            DataError: a file cannot be read, or is not what the manifest says.
            SchemaError: a file lacks a column or has one of another type.
            BadBatch: values are bad beyond what is allowed.
        """
        kept, self._kept = self._kept, {}
        return concat(self._slices(ranges, kept), sum(last - first for _, first, last in ranges))

    def _slices(self, ranges: Sequence[tuple[int, int, int]], kept: dict[int, Block]) -> Iterator[Block]:
        for group, first, last in ranges:
            block = kept.pop(group, None) or self._kept.get(group) or self._decode(group)
            if last < block.rows:
                self._kept[group] = block
            yield block.slice(first, last)

    def _decode(self, group: int) -> Block:
        place = self._places[group]
        file = self._file(place.path)
        try:
            table = file.read_row_group(place.group, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(place.path, error) from None
        block, faults = self._decoder.decode(table, place.number)
        self._ledger.settle(group, block, faults, table, place)
        return block

    def _file(self, path: Path) -> pq.ParquetFile:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
        check_columns(self._columns, file.schema_arrow, str(path))
        self._check_groups(path, file)
        self._files[path] = file
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return file

    def _check_groups(self, path: Path, file: pq.ParquetFile) -> None:
        found = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        if found != self._groups[path]:
            raise DataError(
                f"holds {sum(found)} rows in {len(found)} row groups, the manifest says "
                f"{sum(self._groups[path])} in {len(self._groups[path])}, or of other sizes",
                where=str(path),
                fix=AGAIN,
            )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"is no readable Parquet file: {error}", where=str(path), fix=AGAIN)


def _bad_row(row: int, reason: str, table: pa.Table, place: Place) -> BadRow:
    values = table.slice(row, 1).to_pylist()[0]
    number = place.first + row
    return BadRow(str(place.path), number, reason.format(place=f"row {number}"), json.dumps(values, default=str))
