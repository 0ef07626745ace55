"""What the ``thresher data`` commands do."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from thresher.data.dataset import Dataset
from thresher.data.recipes.base import Recipe
from thresher.data.recipes.registry import build_recipe, recipes
from thresher.data.schema import Schema
from thresher.errors import ConfigError, DataError, nearest
from thresher.launch.preparing import prepare_shown
from thresher.settings import apply_override

CELL = 60
"""Characters of a value that are printed."""


def prepare_from(name: str, options: Sequence[str], out: Path, max_bad_share: float, overwrite: bool) -> None:
    """Prepares the data set of recipe ``name`` in ``out`` and says what it holds.

    Args:
        options: ``option=value`` each; the values are YAML.

    Raises:
        ConfigError: no ``out``, no such recipe, or an option that is not usable.
        ThresherError: as :func:`thresher.data.prepare.prepare`.
    """
    if out == Path():
        raise ConfigError("no folder is given", where="--out", fix="add '--out FOLDER'")
    values: dict[str, Any] = {}
    for option in options:
        apply_override(values, option)
    dataset = prepare_shown(build_recipe(name, values, "options"), out, overwrite, max_bad_share)
    _print_splits(Console(), dataset)
    Console().print(f"Look at it with: thresher data show {out}", soft_wrap=True)


def list_recipes(name: str) -> None:
    """Prints every recipe with its summary, or the options of recipe ``name``.

    Raises:
        ConfigError: there is no such recipe.
    """
    known, console = recipes(), Console()
    if not name:
        table = _table("recipe", "what it prepares")
        for kind in sorted(known.values(), key=lambda kind: kind.recipe):
            table.add_row(kind.recipe, kind.summary)
        console.print(table)
        console.print("Options of one: thresher data recipes NAME")
        return
    if name not in known:
        raise ConfigError(f"no recipe '{name}'", where="command line", fix=nearest(name, known))
    _print_options(console, known[name])


def _print_options(console: Console, kind: type[Recipe]) -> None:
    console.print(f"{kind.recipe}: {kind.summary}", soft_wrap=True)
    table = _table("option", "type", "default")
    schema = kind.model_json_schema()
    for option, field in kind.model_fields.items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        table.add_row(option, _type_name(schema["properties"].get(option, {})), default)
    console.print(table)


def _type_name(described: dict[str, Any]) -> str:
    """A JSON schema's type in a word or two."""
    if "enum" in described:
        return " | ".join(map(str, described["enum"]))
    if "anyOf" in described:
        return " | ".join(_type_name(part) for part in described["anyOf"])
    return str(described.get("format") or described.get("type") or described.get("const") or "keys")


def show_dataset(folder: Path, rows: int) -> None:
    """Prints schema, splits, facts and the first ``rows`` rows of the data set in ``folder``.

    Raises:
        DataError: there is no data set, or a file of it is damaged.
    """
    dataset, console = Dataset.open(folder), Console()
    made = dataset.manifest
    console.print(f"{folder}: '{dataset.schema.name}' by recipe '{made.recipe}'", soft_wrap=True)
    console.print(_schema_table(dataset.schema))
    _print_splits(console, dataset)
    for title, entries in (("option", made.options), ("fact", made.facts)):
        for key, value in entries.items():
            _print_plain(console, f"{title} {key}: {_short(value, 4 * CELL)}")
    first = next(iter(made.splits))
    for row in _first_rows(dataset, first, rows):
        _print_plain(console, "  ".join(f"{key}={_short(value, CELL)}" for key, value in row.items()))


def _print_plain(console: Console, line: str) -> None:
    """Values may hold brackets, which rich would take for its markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _first_rows(dataset: Dataset, split: str, rows: int) -> list[dict[str, Any]]:
    paths = dataset.split(split).paths
    if not paths or not rows:
        return []
    try:
        with pq.ParquetFile(paths[0]) as file:
            batch = next(file.iter_batches(batch_size=rows), None)
            return batch.to_pylist() if batch is not None else []
    except OSError as error:  # pyarrow raises its own subclass for damaged files
        raise DataError(f"cannot be read: {error}", where=str(paths[0]), fix="prepare the data again") from None


def _schema_table(schema: Schema) -> Table:
    table = _table("feature", "kind", "table", "rows", "ids")
    for feature in schema.features:
        name = getattr(feature, "table", "")
        space = schema.table(name) if name else None
        table.add_row(feature.name, feature.kind, name, f"{space.rows:,}" if space else "", space.ids if space else "")
    return table


def _print_splits(console: Console, dataset: Dataset) -> None:
    table = _table("split", "rows", "files", "MB")
    for name, parts in dataset.manifest.splits.items():
        size = sum(part.size_bytes for part in parts) / 1e6
        table.add_row(name, f"{sum(part.rows for part in parts):,}", str(len(parts)), f"{size:.1f}")
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _short(value: object, width: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= width else f"{text[: width - 3]}..."
