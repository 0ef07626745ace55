"""Which features and labels of a schema a model uses, and the messages for choices that do not fit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.data.batch import Batch
from thresher.data.schema import Label, Schema, SparseFeature
from thresher.errors import ConfigError, SchemaError, nearest


@dataclass(frozen=True)
class Inputs:
    """Inputs of a model.

    Attributes:
        keys: keys of the batch's ids, a subset of ``schema.id_tables`` in its order.
        dense: columns of ``Batch.dense``.
    """

    keys: tuple[str, ...]
    dense: tuple[int, ...]


def choose_inputs(schema: Schema, names: tuple[str, ...]) -> Inputs:
    """The inputs called ``names``: sparse, dense and sequence features, and id side columns (``history.category``).

    Args:
        names: none for all of them. A sequence brings its id side columns only when ``names`` is empty.

    Raises:
        ConfigError: a name is unknown, is no input, or no input has ids.
    """
    dense = [feature.name for feature in schema.dense]
    allowed = [*schema.id_tables, *dense]
    for name in names:
        if name not in allowed:
            raise _not_an_input(schema, name, allowed)
    chosen = names or tuple(allowed)
    keys = tuple(key for key in schema.id_tables if key in chosen)
    if not keys:
        raise ConfigError(
            f"the model reads no id feature of schema '{schema.name}'",
            where="model.features",
            fix=f"add a sparse or sequence feature. {nearest('', schema.id_tables)}",
        )
    return Inputs(keys, tuple(i for i, name in enumerate(dense) if name in chosen))


def _not_an_input(schema: Schema, name: str, allowed: list[str]) -> ConfigError:
    kinds = {feature.name: feature.kind for feature in schema.features} | dict.fromkeys(
        schema.float_side_keys, "float side column"
    )
    known = f"'{name}' is a {kinds[name]}, not an input" if name in kinds else f"no feature '{name}'"
    return ConfigError(f"{known} of schema '{schema.name}'", where="model.features", fix=nearest(name, allowed))


def choose_labels(schema: Schema, names: tuple[str, ...]) -> tuple[Label, ...]:
    """The labels called ``names``, in that order; the schema's first where ``names`` is empty.

    Raises:
        SchemaError: the schema has no label.
        ConfigError: a name is unknown or given twice.
    """
    labels = {label.name: label for label in schema.labels}
    if not labels:
        raise SchemaError("no label to predict", where=f"schema '{schema.name}'", fix="declare a feature of kind label")
    for name in names:
        if name not in labels:
            raise ConfigError(f"no label '{name}'", where="model.labels", fix=nearest(name, labels))
        if names.count(name) > 1:
            raise ConfigError(f"label '{name}' is given twice", where="model.labels", fix="name it once")
    return tuple(labels[name] for name in names) or (next(iter(labels.values())),)


def one_id_features(schema: Schema, table: str) -> list[SparseFeature]:
    """Sparse features with exactly one id a row that index ``table``."""
    return [feature for feature in schema.sparse if feature.table == table and not feature.many]


class DenseColumns(nn.Module):
    """Chosen columns of ``Batch.dense``: [B, n] float32, a view where all are chosen."""

    def __init__(self, schema: Schema, columns: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.width = len(columns)
        partial = columns != tuple(range(len(schema.dense)))
        columns_tensor = torch.tensor(columns, dtype=torch.int64, device=device) if partial else None
        self.columns: Tensor | None
        self.register_buffer("columns", columns_tensor, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        return batch.dense if self.columns is None else batch.dense.index_select(1, self.columns)
