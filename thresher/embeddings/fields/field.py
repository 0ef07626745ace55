"""Fields: what is scored and pruned. A field is one input of one collection of tables.

A collection gives a vector for each sample (or each id) and key; a feature that reads two tables of the collection has
two keys, ``feature@table``, which are scored and pruned together. Means and constants of all fields stand in one row
of columns, in the order of the fields and of their keys, whatever order a sharded collection gives its keys:

    field       user        item@a   item@b     history
    columns     0 .. 15     16 .. 31 32 .. 47   48 .. 63
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from thresher.embeddings.tables import TableInfo


@dataclass(frozen=True)
class Field:
    """One input of one collection.

    Attributes:
        name: the feature's, or ``module:feature`` where several collections read the feature.
        module: path of the collection in the model.
        feature: its key in the batch.
        keys: its keys in the collection's output.
        widths: columns of each key.
        tables: path in the model of the table of each key.
        pooled: whether the collection gives a vector a sample, and not one an id.
    """

    name: str
    module: str
    feature: str
    keys: tuple[str, ...]
    widths: tuple[int, ...]
    tables: tuple[str, ...]
    pooled: bool

    @property
    def width(self) -> int:
        """Columns of all its keys."""
        return sum(self.widths)


def find_fields(infos: Sequence[TableInfo]) -> tuple[Field, ...]:
    """The fields of a model's tables, in the order of the tables and of their features."""
    readers: dict[tuple[str, str], list[TableInfo]] = {}
    for info in infos:
        for feature in info.features:
            readers.setdefault((info.module, feature), []).append(info)
    uses = Counter(feature for _, feature in readers)
    return tuple(_field(module, feature, tables, uses[feature] > 1) for (module, feature), tables in readers.items())


def _field(module: str, feature: str, tables: list[TableInfo], ambiguous: bool) -> Field:
    return Field(
        name=f"{module}:{feature}" if ambiguous else feature,
        module=module,
        feature=feature,
        keys=tuple(f"{feature}@{info.table}" for info in tables) if len(tables) > 1 else (feature,),
        widths=tuple(info.dim for info in tables),
        tables=tuple(info.path for info in tables),
        pooled=tables[0].pooled,
    )


def first_columns(fields: Sequence[Field]) -> list[int]:
    """The first column of each field, and the number of all columns at the end."""
    return list(accumulate((field.width for field in fields), initial=0))


def columns_by_key(fields: Sequence[Field], module: str) -> dict[str, tuple[int, int, int]]:
    """For each output key of a collection: (number of its field, its first column, its width)."""
    found: dict[str, tuple[int, int, int]] = {}
    for number, (field, first) in enumerate(zip(fields, first_columns(fields), strict=False)):
        if field.module == module:
            starts = accumulate(field.widths, initial=first)
            found |= {k: (number, s, w) for k, s, w in zip(field.keys, starts, field.widths, strict=False)}
    return found
