"""Sequences as text: ``user item item ...`` a line, the items oldest first, values parted by white space.

A user may have several lines, in several files too: they are joined in the order of lines and files, of which
``train.txt``, ``valid.txt``, ``test.txt`` come first, in this order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from thresher.data.recipes.base import Chunk
from thresher.data.recipes.from_files import FromFiles, IdTables
from thresher.data.recipes.sequences import Interactions, joined, leave_one_out, next_item_schema, too_short
from thresher.data.schema import Schema
from thresher.data.sources import Lines, choose_files, read_lines
from thresher.errors import DataError

_GIVEN_SPLITS = ("train.txt", "valid.txt", "test.txt")


class UserItem(IdTables, FromFiles):
    """Next-item rows (see ``sequences``). A row's file and number are those of its target.

    Attributes:
        max_length: histories keep their newest items.
    """

    recipe: ClassVar[str] = "user_item"
    summary: ClassVar[str] = "text lines 'user item item ...': predict the next item"

    max_length: int = Field(default=50, ge=1)

    def data_schema(self) -> Schema:
        return next_item_schema("user_item", self.table("item"), self.table("user"), self.max_length)

    def inputs(self) -> tuple[Path, ...]:
        files = choose_files(self.source, ("*.txt", "*.txt.gz"), "sequence file")
        return tuple(sorted(files, key=_place))

    def chunks(self) -> Iterator[Chunk]:
        yield from leave_one_out(self._interactions())

    def facts(self) -> dict[str, Any]:
        return {"users_left_out": too_short(self._interactions())}

    def _interactions(self) -> Interactions:
        parts = [interactions(lines, str(path)) for path in self.inputs() for lines in read_lines(path)]
        whole = joined(parts)
        if not len(whole.item):
            raise DataError("no line holds a user and an item", where=whole.files[0], fix="give 'user item item ...'")
        return whole


def _place(path: Path) -> int:
    """Published splits are joined in the order of their times, other files in the order given."""
    return _GIVEN_SPLITS.index(path.name) if path.name in _GIVEN_SPLITS else len(_GIVEN_SPLITS)


def interactions(lines: Lines, file: str) -> Interactions:
    """Lines as interactions; a line with a user alone has none."""
    words = pc.utf8_split_whitespace(lines.texts())
    counts = pc.list_value_length(words).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = words.flatten()
    is_user = np.zeros(len(flat), bool)
    is_user[np.cumsum(counts) - counts] = True
    line = np.repeat(np.arange(len(counts)), counts - 1)
    user = flat.filter(pa.array(is_user)).take(pa.array(line))
    return Interactions((file,), lines.numbers[line], user, flat.filter(pa.array(~is_user)), bad=lines.bad)
