"""The columns a schema has in a Parquet file: names, shapes and physical types.

==============  =======================================  =========================================
feature         column                                   type written (types read)
==============  =======================================  =========================================
sparse          its name                                 int32, int64 for tables of more than 2^31 rows (any integer)
sparse, many    its name; ``<name>.weights`` if weighed  list of such ids; list<float> (list of any float)
sequence        its name; ``<name>.<side>`` per side     list of such ids; list of such ids or list<float>
dense, label    its name                                 float (any number)
weight          its name                                 float (any number)
time, group     its name                                 int64 (any integer)
==============  =======================================  =========================================
"""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from thresher.data.schema import Schema, Table
from thresher.errors import SchemaError, nearest

Role = Literal["id", "float", "int"]


@dataclass(frozen=True)
class Column:
    """One column of a Parquet file.

    Attributes:
        name: the column's name in the file.
        role: ``id`` indexes ``table``; ``float`` must be finite; ``int`` is any int64.
        ragged: a list a row instead of a value a row.
        table: the table of ids; None for other roles.
        partner: the ragged id column whose lengths this one shares; empty for none.
        max_length: longest list allowed; 0 for any.
        nonnegative: values below zero are bad.
        binary: values other than 0 and 1 are bad.
    """

    name: str
    role: Role
    ragged: bool = False
    table: Table | None = None
    partner: str = ""
    max_length: int = 0
    nonnegative: bool = False
    binary: bool = False

    @property
    def written(self) -> pa.DataType:
        """The type in which :class:`DatasetWriter` stores the column."""
        item = pa.float32() if self.role == "float" else pa.int64()
        if self.table is not None and self.table.id_limit <= 1 << 31:
            item = pa.int32()
        return pa.list_(pa.field("element", item, nullable=False)) if self.ragged else item

    def check_type(self, found: pa.DataType, where: str) -> None:
        """Refuses a column whose type cannot hold what the schema says.

        Raises:
            SchemaError: names the column, the type found and the types expected.
        """
        item = found
        if self.ragged:
            item = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else pa.null()
        number = pa.types.is_integer(item) or pa.types.is_boolean(item)
        if self.role == "float":
            number = pa.types.is_floating(item) or (number and not self.ragged)
        elif pa.types.is_boolean(item):
            number = False
        if not number:
            raise SchemaError(
                f"column '{self.name}' has type {found}, expected {self.written}",
                where=where,
                fix="prepare the data again, or correct the schema",
            )

    def describe(self) -> str:
        """How messages call the column: ``feature 'user_id' of table 'users'``."""
        of = f" of table '{self.table.name}'" if self.table else ""
        return f"feature '{self.name}'{of}"


def columns_of(schema: Schema) -> tuple[Column, ...]:
    """All columns of ``schema``: ids in the order of ``schema.id_tables``, then floats, then integers."""
    found: list[Column] = []
    for sparse in schema.sparse:
        found.append(Column(sparse.name, "id", sparse.many, schema.table(sparse.table)))
    for sequence in schema.sequences:
        limit = sequence.max_length
        found.append(Column(sequence.name, "id", True, schema.table(sequence.table), max_length=limit))
        for side in sequence.side:
            if side.table:
                found.append(Column(sequence.key(side), "id", True, schema.table(side.table), sequence.name))
    found += [Column(f"{f.name}.weights", "float", True, partner=f.name) for f in schema.sparse if f.weights]
    for sequence in schema.sequences:
        found += [
            Column(sequence.key(side), "float", True, partner=sequence.name) for side in sequence.side if not side.table
        ]
    found += [Column(feature.name, "float") for feature in schema.dense]
    found += [Column(label.name, "float", binary=label.task == "binary") for label in schema.labels]
    if schema.weight:
        found.append(Column(schema.weight.name, "float", nonnegative=True))
    found += [Column(feature.name, "int") for feature in (schema.time, schema.group) if feature]
    return tuple(found)


def check_columns(columns: tuple[Column, ...], found: pa.Schema, where: str) -> None:
    """Refuses a file that lacks a column or holds one of another type.

    Raises:
        SchemaError: names the first such column; for a missing one, the nearest name in the file.
    """
    for column in columns:
        if column.name not in found.names:
            raise SchemaError(f"no column '{column.name}'", where=where, fix=nearest(column.name, found.names))
        column.check_type(found.field(column.name).type, where)
