"""What recipes that read files have in common: where the files lie, and which rows are held out."""

from abc import ABC
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from thresher.data.recipes.base import Chunk, Recipe, random_split
from thresher.data.sources import Part


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


Sources = Annotated[tuple[Path, ...], BeforeValidator(_listed)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
FILE_STRIDE = 1 << 40
"""Row r of the f-th file has the number f * FILE_STRIDE + r over the whole source."""


class FromFiles(Recipe, ABC):
    """A recipe that reads files.

    Attributes:
        source: files, or folders that hold them.
        valid, test: shares of rows held out for the splits of those names; 0 for none.
        seed: of everything drawn at random.
    """

    source: Sources = Field(exclude=True)
    valid: Share = 0.1
    test: Share = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _rows_left(self) -> "FromFiles":
        if self.valid + self.test >= 1.0:
            raise ValueError(f"valid + test is {self.valid + self.test:g}, which leaves no rows to train on")
        return self

    def at_random(self, file: int, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[n] positions in ``SPLITS`` for rows of the ``file``-th file, whatever the chunking."""
        return random_split(file * FILE_STRIDE + rows, self.valid, self.test, self.seed)


def rows_of(part: Part, split: str, table: pa.Table | None = None) -> Chunk:
    """What a source read, as rows of a split; with the columns of ``table`` if given."""
    return Chunk(split, part.table if table is None else table, part.file, part.rows, part.bad)
