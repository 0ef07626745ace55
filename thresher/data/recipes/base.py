"""What a recipe is: options, a schema, and a stream of raw rows that know their split and their place of origin."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thresher.data.hashing import uniform
from thresher.data.quarantine import BadRow
from thresher.data.schema import Schema
from thresher.settings import Settings

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Chunk:
    """Some rows of one split, as the source has them.

    Raw columns, by feature (further columns are ignored); numbers may also be given as strings, which are parsed:

        sparse      string or integer under the feature's name; ``many``: list of them, and its weights under the
                    column that ``SparseFeature.weights`` names
        sequence    list of strings or integers under the feature's name, oldest first; side columns as lists under
                    ``<sequence>.<side>``, of the same lengths
        dense, label, weight    number
        time, group             integer

    Attributes:
        split: name of the split, one of ``SPLITS``.
        table: n rows.
        file: the file they come from, as messages name it.
        rows: [n] int64, number of each row in ``file``, counted from 1: the line number of a text file (a header is
            line 1).
        bad: rows (lines) of the same file that could not even be parsed; they are not in ``table``.
    """

    split: str
    table: pa.Table
    file: str
    rows: NDArray[np.int64]
    bad: tuple[BadRow, ...] = ()


class Recipe(Settings, ABC):
    """A way to make a data set. Options are the fields of the subclass; a field with ``exclude=True`` says only where
    something lies, not what comes out, and does not count when options are compared.

    Attributes:
        recipe: the name users type.
        summary: one line for ``thresher data recipes``.
    """

    recipe: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def data_schema(self) -> Schema:
        """Tables and features. ``rows`` of a vocabulary table is an upper bound; the data set's own schema states how
        many are in use. May read sources, but must return the same schema each time.
        """

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """The rows, in chunks of at most some 100,000, of any split in any order. Called once or twice; each call
        yields the same rows in the same order.

        Raises:
            DataError: a source is missing or is not of the format.
        """

    def inputs(self) -> tuple[Path, ...]:
        """Files the rows come from; a finished data set is stale when one of them changes."""
        return ()

    def facts(self) -> dict[str, Any]:
        """What else is worth recording with the data set (JSON values); asked after the last chunk."""
        return {}


def whole(split: str, table: pa.Table, file: str, first_row: int = 1, bad: tuple[BadRow, ...] = ()) -> Chunk:
    """A chunk of consecutive rows."""
    rows = np.arange(first_row, first_row + table.num_rows, dtype=np.int64)
    return Chunk(split, table, file, rows, bad)


def random_split(index: NDArray[np.int64], valid: float, test: float, seed: int) -> NDArray[np.uint8]:
    """Assigns rows to splits by a hash of their number, so neither order nor chunking matters.

    Args:
        index: [n] numbers of the rows over the whole source (or of whatever must stay together, such as a user).
        valid: share of rows for ``valid``, in expectation.
        test: share of rows for ``test``.
        seed: another seed gives another split.

    Returns:
        [n] positions in ``SPLITS``.
    """
    return by_threshold(1.0 - uniform(index, seed), 1.0 - valid - test, 1.0 - test)


def by_threshold(key: NDArray[Any], valid_from: float, test_from: float) -> NDArray[np.uint8]:
    """Assigns rows to splits by a key such as time: [n] keys to [n] positions in ``SPLITS``."""
    return (key >= valid_from).astype(np.uint8) + (key >= test_from).astype(np.uint8)


def time_cuts(time: NDArray[Any], valid: float, test: float) -> tuple[float, float]:
    """Keys from which on rows are ``valid`` and ``test``, so that the newest rows are held out in those shares."""
    ordered = np.sort(time)
    cuts = [min(int(len(ordered) * share), len(ordered) - 1) for share in (1.0 - valid - test, 1.0 - test)]
    return float(ordered[cuts[0]]), float(ordered[cuts[1]])


def divide(chunk: Chunk, which: NDArray[np.uint8]) -> Iterator[Chunk]:
    """The rows of ``chunk`` by split: ``which`` holds [n] positions in ``SPLITS``; its bad rows go with the first."""
    bad = chunk.bad
    for position, split in enumerate(SPLITS):
        chosen = np.flatnonzero(which == position)
        if len(chosen) == len(which) > 0:
            yield replace(chunk, split=split)
            return
        if len(chosen) or (bad and position == len(SPLITS) - 1):
            yield Chunk(split, chunk.table.take(pa.array(chosen)), chunk.file, chunk.rows[chosen], bad)
            bad = ()
