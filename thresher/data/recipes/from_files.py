"""What recipes that read files have in common: where the files lie, which rows are held out, how ids become rows."""

from abc import ABC
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from thresher.data.recipes.base import Chunk, Recipe, by_threshold, random_split, time_cuts
from thresher.data.schema import Table
from thresher.data.sources import Part
from thresher.errors import DataError
from thresher.settings import Settings


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


Sources = Annotated[tuple[Path, ...], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
FILE_STRIDE = 1 << 40
"""Row r of the f-th file has the number f * FILE_STRIDE + r over the whole source."""


class FromFiles(Recipe, ABC):
    """A recipe that reads files.

    Attributes:
        source: files, or folders that hold them.
    """

    source: Sources = Field(exclude=True)


class HeldOut(FromFiles, ABC):
    """A recipe that holds out shares of its rows.

    Attributes:
        valid, test: shares of rows held out for the splits of those names; 0 for none.
        seed: of everything drawn at random.
    """

    valid: Share = 0.1
    test: Share = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _rows_left(self) -> "HeldOut":
        if self.valid + self.test >= 1.0:
            raise ValueError(f"valid + test is {self.valid + self.test:g}, which leaves no rows to train on")
        return self

    def at_random(self, file: int, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[n] positions in ``SPLITS`` for rows of the ``file``-th file, whatever the chunking."""
        return random_split(file * FILE_STRIDE + rows, self.valid, self.test, self.seed)

    def cuts(self, times: Iterable[NDArray[np.int64]]) -> tuple[float, float]:
        """Times from which on rows are ``valid`` and ``test``: the newest rows are held out.

        Raises:
            DataError: that would leave no row to train on, for want of different times.
        """
        known = np.concatenate([np.empty(0, np.int64), *times])
        if not len(known):
            raise DataError("no row has a time", where=str(self.source[0]), fix="use split=random")
        valid_from, test_from = time_cuts(known, self.valid, self.test)
        if valid_from <= known.min() and self.valid + self.test:
            raise DataError(
                f"the rows cannot be split by time: most share the time {int(known.min())}",
                where=str(self.source[0]),
                fix="use split=random",
            )
        return valid_from, test_from

    def by_time(self, time: NDArray[np.int64], cuts: tuple[float, float]) -> NDArray[np.uint8]:
        """[n] positions in ``SPLITS`` for times; a share of 0 gets no row."""
        valid_from, test_from = cuts
        return by_threshold(time, valid_from if self.valid + self.test else np.inf, test_from if self.test else np.inf)


class IdTables(Settings):
    """How raw ids become rows of tables.

    Attributes:
        ids: ``hash``, a ``vocabulary`` of the training split, or ``raw``: rows are given while training.
        table_rows: rows of each table; an upper bound for a vocabulary and for raw ids.
        min_count: vocabulary only: rarer values share the unseen row.
    """

    ids: Literal["hash", "vocabulary", "raw"] = "hash"
    table_rows: int = Field(default=100_000, ge=3)
    min_count: int = Field(default=1, ge=1)

    def table(self, name: str) -> Table:
        """A table with these options."""
        return Table(name=name, rows=self.table_rows, ids=self.ids, min_count=self.min_count)


def rows_of(part: Part, split: str, table: pa.Table | None = None) -> Chunk:
    """What a source read, as rows of a split; with the columns of ``table`` if given."""
    return Chunk(split, part.table if table is None else table, part.file, part.rows, part.bad)
