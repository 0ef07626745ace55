"""A run configuration without the fields that an earlier run found useless: to train a smaller model from scratch.

Dropped inside a run, a field costs no bytes, no exchange and no lookups any more, but its constants still go through
the dense layers. In a perceptron alone they could be folded into the first layer's bias without changing a prediction;
a factorisation machine, a cross network or a dot product multiplies them with the other fields' vectors, so a smaller
model with the same predictions does not exist there. Training anew without the fields works for all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from thresher.data.schema import Schema
from thresher.errors import ConfigError, nearest
from thresher.trainer.report.files import Record, write_atomically
from thresher.trainer.report.run import Run


@dataclass(frozen=True)
class Useless:
    """What a run says of its fields.

    Attributes:
        record: the newest of ``metrics.jsonl`` about fields.
        names: dropped fields; of a dry run those that it would have dropped.
    """

    record: Record
    names: tuple[str, ...]


def useless_fields(run: Run) -> Useless:
    """The fields that ``run`` dropped, or would have.

    Raises:
        ConfigError: it scored no fields.
    """
    records = run.of("fields")
    if not records:
        raise ConfigError(
            "fields were not scored in this run",
            where=str(run.folder),
            fix="train it with fields.score_every=500, say, in another run_dir",
        )
    newest = records[-1]
    names = newest["changed"] if newest["event"] == "dry run" else newest["dropped"]
    return Useless(newest, tuple(names))


def without_fields(run: Run, names: tuple[str, ...]) -> dict[str, Any]:
    """The run's configuration with ``model.features`` lacking ``names``, to be trained from the start.

    Raises:
        ConfigError: a name is no field of the model, or no field is left.
    """
    values = {key: value for key, value in run.config.items() if key not in ("run_dir", "fields")}
    read = tuple(values["model"].get("features") or _inputs(run.facts.columns))
    fields = [name for name in read if name in run.facts.columns.id_tables]
    gone = {name.rpartition(":")[2] for name in names}
    for name in gone:
        if name not in fields:
            raise ConfigError(f"the model reads no field '{name}'", where=str(run.folder), fix=nearest(name, fields))
    if gone == set(fields):
        raise ConfigError("no field would be left", where=str(run.folder), fix="keep one")
    values["name"] = f"{values['name']}-smaller"
    values["model"] = {**values["model"], "features": [name for name in read if name not in gone]}
    return values


def write_smaller(run: Run, names: tuple[str, ...], path: Path) -> None:
    """Writes the configuration without ``names`` as YAML.

    Raises:
        ConfigError: as :func:`without_fields`; or the file is there already, or cannot be written.
    """
    text = yaml.safe_dump(without_fields(run, names), sort_keys=False)
    if path.exists():
        raise ConfigError("is there already", where=str(path), fix="give another name")
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(path), fix="give another path") from None


def _inputs(schema: Schema) -> tuple[str, ...]:
    """All that a model reads where ``model.features`` is empty."""
    return (*schema.id_tables, *(feature.name for feature in schema.dense))
