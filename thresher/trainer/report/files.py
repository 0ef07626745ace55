"""The files of a run directory that a report is made from, beside ``config.yaml`` and ``plan.json``.

``metrics.jsonl``: one JSON object a line, in the order of events. All have ``kind``, ``step`` and ``time`` (unix
seconds); a value that is not finite is null. By kind::

    start   resumed_step, world, device         a process began, at ``step`` = ``resumed_step``
    train   the fields of StepRecord
    tables  the fields of TableRecord             in runs with tiers
    fields  the fields of FieldRecord             in runs that score fields
    eval    split, rows, seconds, metrics {name: value}
    save    path, seconds, bytes
    end     status, seconds, best {name: value}, message

``facts.json``: what does not change during a run; see :class:`Facts`.
"""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from thresher.data.schema import Schema
from thresher.errors import DataError
from thresher.settings import Settings, parse
from thresher.sharding.plan import Plan

METRICS = "metrics.jsonl"
FACTS = "facts.json"
PLAN = "plan.json"
CONFIG = "config.yaml"

Record = dict[str, Any]


class Facts(Settings):
    """``facts.json``.

    Attributes:
        format: version of this file's format.
        name: of the run.
        model: name of the model in the zoo.
        recipe: of the data set; empty where they came prepared.
        columns: the schema of the data set.
        data: the data set's own facts: ``rows`` by split, ``distinct_ids`` and ``missing_share`` by key, and others.
        versions: distribution name to version.
        dense_parameters: number of parameters outside the tables.
    """

    format: int = 1
    name: str
    model: str
    recipe: str
    columns: Schema
    data: dict[str, Any]
    versions: dict[str, str]
    world: int
    device: str
    dense_parameters: int
    total_steps: int
    resumed_step: int


def write_facts(folder: Path, facts: Facts) -> None:
    """Writes ``facts.json`` into the run directory."""
    write_atomically(folder / FACTS, json.dumps(facts.model_dump(mode="json"), indent=1, default=str) + "\n")


def read_facts(folder: Path) -> Facts:
    """Reads ``facts.json``.

    Raises:
        DataError: the file is missing or no JSON.
        ConfigError: it is JSON of another format; names the key.
    """
    return parse(Facts, _read_json(folder / FACTS), str(folder / FACTS))


def read_plan(folder: Path) -> Plan:
    """Reads ``plan.json``; raises as :func:`read_facts`."""
    return parse(Plan, _read_json(folder / PLAN), str(folder / PLAN))


def read_records(folder: Path) -> list[Record]:
    """Records of ``metrics.jsonl`` in order; none where it does not exist. Null values become NaN.

    The last line may be torn, because the process that wrote it was killed: it is left out.

    Raises:
        DataError: another line is no record; names it.
    """
    path = folder / METRICS
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise DataError("is no record", where=f"{path}:{number}", fix="remove that line")
    return records


def to_line(record: Record) -> str:
    """One line of ``metrics.jsonl``."""
    return json.dumps(_finite(record), allow_nan=False, default=str) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Replaces ``path``: a reader, or a kill, meets the old text or the new one, never a part.

    Raises:
        OSError: it cannot be written. Nothing is left of the attempt: what fills a disk must not keep it full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), fix="give the folder of a run that has started") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be read: {error}", where=str(path), fix="resume the run, which writes it anew"
        ) from None


def _record(line: bytes) -> Record | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int) or "kind" not in values:
        return None
    nan_for_null: Record = _nan(values)
    return nan_for_null


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan(part) for key, part in value.items()}
    return math.nan if value is None else value
