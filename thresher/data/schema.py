"""The schema: which columns a data set has, what each means to a model, and which table its ids index.

Rows of a table that are reserved, whatever the kind of ids (``index`` excepted, whose ids are used as they are):

    row 0   the id is missing (a null, an empty string)
    row 1   the id was never seen when the vocabulary was built (``vocabulary`` only)
"""

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from thresher.errors import SchemaError, nearest
from thresher.settings import Settings

MISSING_ROW = 0
UNSEEN_ROW = 1
RAW_IDS = 1 << 62

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Table(Settings):
    """An embedding table's id space. Its width is the model's business.

    Attributes:
        name: unique among tables.
        rows: number of rows, reserved ones included.
        ids: ``hash`` (xxhash of the raw value onto the rows), ``vocabulary`` (raw value to row, built by prepare),
            ``index`` (raw values are rows already, 0 <= id < rows) or ``raw`` (xxhash of the raw value onto 2^62
            numbers: no two values share one in practice; rows are given to them during training, ``rows`` at most).
        min_count: ``vocabulary`` only: values seen less often in the training split share the unseen row.
    """

    name: Name
    rows: int = Field(ge=1)
    ids: Literal["hash", "vocabulary", "index", "raw"] = "hash"
    min_count: int = Field(default=1, ge=1)

    @property
    def id_limit(self) -> int:
        """Ids of the table in files and batches are in 0..id_limit-1."""
        return RAW_IDS if self.ids == "raw" else self.rows


class SparseFeature(Settings):
    """Ids of one table: one a row, or any number (``many``), optionally with a weight each.

    Attributes:
        weights: name of the column of aligned float weights; empty for none.
    """

    kind: Literal["sparse"] = "sparse"
    name: Name
    table: Name
    many: bool = False
    weights: str = ""


class DenseFeature(Settings):
    """A float a row. ``transform`` is applied by prepare; a missing value becomes ``fill`` after it."""

    kind: Literal["dense"] = "dense"
    name: Name
    transform: Literal["none", "log1p", "standard"] = "none"
    fill: float = 0.0


class SideColumn(Settings):
    """A column aligned with a sequence, element by element: ids of ``table``, or floats where ``table`` is empty."""

    name: Name
    table: str = ""


class SequenceFeature(Settings):
    """An ordered history of ids, oldest first, cut to the newest ``max_length``; side columns share its lengths.

                 row ->    0          1      2
    "history"            [7 7 9]     [ ]    [4]       values 7 7 9 4    lengths 3 0 1
    "history.category"   [2 2 5]     [ ]    [1]       values 2 2 5 1    lengths 3 0 1
    """

    kind: Literal["sequence"] = "sequence"
    name: Name
    table: Name
    max_length: int = Field(ge=1)
    side: tuple[SideColumn, ...] = ()

    def key(self, side: SideColumn) -> str:
        """The key of a side column, in files and in batches."""
        return f"{self.name}.{side.name}"


class Label(Settings):
    """What is predicted: 0 or 1 (``binary``) or a float (``regression``)."""

    kind: Literal["label"] = "label"
    name: Name
    task: Literal["binary", "regression"] = "binary"


class Weight(Settings):
    """The weight of a sample in loss and metrics (>= 0)."""

    kind: Literal["weight"] = "weight"
    name: Name


class Time(Settings):
    """When the sample happened: int64, seconds since 1970."""

    kind: Literal["time"] = "time"
    name: Name


class Group(Settings):
    """What grouped metrics (GAUC) group by: an int64, a user or a session."""

    kind: Literal["group"] = "group"
    name: Name


Feature = Annotated[
    SparseFeature | DenseFeature | SequenceFeature | Label | Weight | Time | Group, Field(discriminator="kind")
]


class Schema(Settings):
    """Tables and features of a data set. Feature order is the column order of every batch."""

    name: Name
    tables: tuple[Table, ...] = ()
    features: tuple[Feature, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "Schema":
        _unique("table", [table.name for table in self.tables])
        _unique("feature", [*(f.name for f in self.features), *self.side_keys])
        tables = {table.name for table in self.tables}
        for feature, table in self._table_uses():
            if table not in tables:
                raise ValueError(f"feature '{feature}' uses the unknown table '{table}'; {nearest(table, tables)}")
        for kind in (Weight, Time, Group):
            if sum(isinstance(f, kind) for f in self.features) > 1:
                raise ValueError(f"at most one feature of kind '{kind.__name__.lower()}'")
        return self

    def _table_uses(self) -> list[tuple[str, str]]:
        uses = [(f.name, f.table) for f in self.sparse] + [(f.name, f.table) for f in self.sequences]
        return uses + [(s.key(c), c.table) for s in self.sequences for c in s.side if c.table]

    @property
    def sparse(self) -> tuple[SparseFeature, ...]:
        return tuple(f for f in self.features if isinstance(f, SparseFeature))

    @property
    def sequences(self) -> tuple[SequenceFeature, ...]:
        return tuple(f for f in self.features if isinstance(f, SequenceFeature))

    @property
    def dense(self) -> tuple[DenseFeature, ...]:
        return tuple(f for f in self.features if isinstance(f, DenseFeature))

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple(f for f in self.features if isinstance(f, Label))

    @property
    def weight(self) -> Weight | None:
        """The weight feature; None where samples weigh the same."""
        return next((f for f in self.features if isinstance(f, Weight)), None)

    @property
    def time(self) -> Time | None:
        """The time feature; None where samples carry no time."""
        return next((f for f in self.features if isinstance(f, Time)), None)

    @property
    def group(self) -> Group | None:
        """The group feature; None where samples are not grouped."""
        return next((f for f in self.features if isinstance(f, Group)), None)

    @property
    def side_keys(self) -> tuple[str, ...]:
        """Keys of all side columns, of ids and of floats."""
        return tuple(s.key(c) for s in self.sequences for c in s.side)

    @property
    def id_tables(self) -> dict[str, str]:
        """Every key of a batch's KeyedJaggedTensor, in its order, and the table its ids index.

        Sparse features first, then each sequence followed by its id side columns.
        """
        keys = {f.name: f.table for f in self.sparse}
        for sequence in self.sequences:
            keys[sequence.name] = sequence.table
            keys |= {sequence.key(c): c.table for c in sequence.side if c.table}
        return keys

    @property
    def float_side_keys(self) -> tuple[str, ...]:
        """Keys of the side columns that hold floats."""
        return tuple(s.key(c) for s in self.sequences for c in s.side if not c.table)

    def table(self, name: str) -> Table:
        """The table called ``name``.

        Raises:
            SchemaError: there is none; the message names the nearest.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise SchemaError(
            f"no table '{name}'", where=f"schema '{self.name}'", fix=nearest(name, [t.name for t in self.tables])
        )

    def feature(self, name: str) -> Feature:
        """The feature called ``name``.

        Raises:
            SchemaError: there is none; the message names the nearest.
        """
        for feature in self.features:
            if feature.name == name:
                return feature
        names = [f.name for f in self.features]
        raise SchemaError(f"no feature '{name}'", where=f"schema '{self.name}'", fix=nearest(name, names))


def _unique(what: str, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{what} '{twice[0]}' is declared twice")
