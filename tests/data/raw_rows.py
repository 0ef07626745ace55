"""What a recipe yields, gathered by split."""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from thresher.data.parse import parse
from thresher.data.quarantine import BadRow
from thresher.data.recipes.base import Recipe


@dataclass
class Gathered:
    """Raw rows by split, where each stands (file name, row number), and bad rows, the schema's own checks included."""

    tables: dict[str, pa.Table] = field(default_factory=dict)
    places: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return {split: table.num_rows for split, table in self.tables.items()}

    def rows(self, split: str = "train") -> list[dict]:
        return self.tables[split].to_pylist() if split in self.tables else []

    @property
    def total(self) -> int:
        return sum(self.counts().values())

    def mean(self, column: str) -> float:
        values = [float(v) for table in self.tables.values() for v in table.column(column).to_pylist()]
        return sum(values) / len(values)


def gather(recipe: Recipe) -> Gathered:
    found, schema, pieces = Gathered(), recipe.data_schema(), {}
    for chunk in recipe.chunks():
        assert len(chunk.rows) == chunk.table.num_rows <= 100_000
        parsed = parse(chunk.table, schema)
        found.bad += [*chunk.bad, *(BadRow(chunk.file, int(chunk.rows[at]), why, "") for at, why in parsed.bad)]
        if chunk.table.num_rows:
            pieces.setdefault(chunk.split, []).append(chunk.table)
            found.places.setdefault(chunk.split, []).extend((Path(chunk.file).name, int(row)) for row in chunk.rows)
    found.tables = {split: pa.concat_tables(tables) for split, tables in pieces.items()}
    found.bad.sort(key=lambda row: (row.file, row.row))
    return found
