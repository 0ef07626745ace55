"""Side tables: what is known of users and items, one row each, joined to a log by id."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from thresher.data.quarantine import BadRow
from thresher.data.recipes.screen import need
from thresher.data.sources import Layout, read_delimited
from thresher.errors import DataError


@dataclass(frozen=True)
class SideTable:
    """Attributes of ids, held in memory.

    Attributes:
        key: the column that holds the ids, in the side table as in the log.
        columns: names of the attributes.
        table: the ids, each once, and their attributes.
        bad: lines of the file that could not be read.
    """

    key: str
    columns: tuple[str, ...]
    table: pa.Table
    bad: tuple[BadRow, ...] = ()

    @classmethod
    def read(cls, files: Iterable[Path], layout: Layout, key: str, columns: Iterable[str] = ()) -> "SideTable | None":
        """Reads side tables of the same columns; None if there are no files.

        Args:
            columns: attributes to take where the file has them; none given: all.

        Raises:
            DataError: a file cannot be read, or an id stands in it twice.
            SchemaError: there is no column ``key``.
        """
        parts = [need(part, key) for path in files for part in read_delimited(path, layout, (key,))]
        if not parts:
            return None
        table = pa.concat_tables([part.table for part in parts], promote_options="default").combine_chunks()
        ids = table.column(key)
        if len(ids.unique()) < len(ids):
            counts = ids.value_counts()
            twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
            raise DataError(f"{key} {twice!r} stands twice", where=parts[-1].file, fix="keep one line for each id")
        wanted = tuple(columns) or tuple(name for name in table.column_names if name != key)
        names = tuple(name for name in wanted if name in table.column_names)
        return cls(key, names, table.select([key, *names]), tuple(row for part in parts for row in part.bad))

    def renamed(self, names: Mapping[str, str]) -> "SideTable":
        """The same with other names for those columns that ``names`` mentions."""
        table = self.table.rename_columns([names.get(name, name) for name in self.table.column_names])
        columns = tuple(names.get(name, name) for name in self.columns)
        return replace(self, key=names.get(self.key, self.key), columns=columns, table=table)

    def join(self, table: pa.Table) -> pa.Table:
        """``table`` with the attributes of its ids; null where an id is unknown."""
        at = pc.index_in(table.column(self.key).combine_chunks(), self.table.column(self.key).combine_chunks())
        for name in self.columns:
            table = table.append_column(name, self.table.column(name).combine_chunks().take(at))
        return table


def bad_of(sides: Iterable[SideTable]) -> tuple[BadRow, ...]:
    """The bad rows of all of them."""
    return tuple(row for side in sides for row in side.bad)
