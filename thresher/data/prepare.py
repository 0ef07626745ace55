"""Raw rows of a recipe to a data set on disk: two streaming passes, all or nothing."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_64_hexdigest

from thresher.data.dataset import Dataset
from thresher.data.encode import Encoder, Moments
from thresher.data.facts import Tally
from thresher.data.parse import Parsed, parse
from thresher.data.quarantine import BadRow, Quarantine
from thresher.data.recipes.base import Chunk, Recipe
from thresher.data.schema import Schema
from thresher.data.staging import staged
from thresher.data.vocabulary import Vocabulary, VocabularyBuilder
from thresher.data.writer import DatasetWriter
from thresher.errors import ConfigError, DataError

TRAIN = "train"
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Progress:
    """How far a preparation is: ``phase`` is ``vocabulary`` or ``write``, ``rows`` counts within the phase."""

    phase: str
    rows: int
    seconds: float


Report = Callable[[Progress], None]


def prepare(
    recipe: Recipe,
    out: Path,
    *,
    max_bad_share: float = 0.001,
    overwrite: bool = False,
    progress: Report = lambda _: None,
) -> Dataset:
    """Makes the data set of ``recipe`` in the folder ``out``, or opens it if it is there already.

    Two passes over the recipe's rows: vocabularies and moments from the training split (skipped where the schema needs
    neither), then encode and write. Memory: a chunk, the vocabularies, the open row groups. Everything is written to
    ``<out>.partial``, which is renamed at the end; a killed preparation leaves nothing that looks finished.

    Bad rows go to ``quarantine.jsonl`` in the folder (in ``<out>.partial`` when the preparation fails).

    Args:
        max_bad_share: bad rows over all rows above which preparation fails.
        overwrite: replace a data set made by another recipe, other options, or from inputs that have changed.
        progress: called after every chunk.

    Raises:
        ConfigError: ``out`` holds another data set, or something that is no data set.
        DataError: a source cannot be read; another process prepares ``out``.
        BadBatch: too many bad rows.
        SchemaError: the rows do not have the schema's columns.
    """
    finished = _finished(recipe, out, overwrite)
    if finished is not None:
        return finished
    with staged(out) as folder:
        _make(recipe, folder, max_bad_share, _Clock(progress))
    return Dataset.open(out)


class _Clock:
    def __init__(self, report: Report) -> None:
        self._report, self._start = report, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def tell(self, phase: str, rows: int) -> None:
        self._report(Progress(phase, rows, self.seconds))


def _make(recipe: Recipe, folder: Path, max_bad_share: float, clock: _Clock) -> None:
    schema = recipe.data_schema()
    vocabularies, moments = _learn(recipe, schema, Quarantine(folder, max_bad_share), clock)
    schema = _in_use(schema, vocabularies)
    encoder, tally = Encoder(schema, vocabularies, moments), Tally(schema)
    quarantine = Quarantine(folder, max_bad_share)
    writer = DatasetWriter(folder, schema, recipe.recipe, _options(recipe))
    for name, vocabulary in vocabularies.items():
        vocabulary.save(folder / "vocabulary" / f"{name}.parquet")
    for chunk in recipe.chunks():
        encoded, parsed = encoder.encode(chunk.table)
        quarantine.add(chunk.table.num_rows + len(chunk.bad), [*chunk.bad, *bad_rows(chunk, parsed)])
        if encoded.num_rows:
            writer.write(chunk.split, encoded)
        tally.add(chunk.split, encoded, parsed.table)
        clock.tell("write", quarantine.rows)
    quarantine.check()
    if not quarantine.rows:
        raise DataError("the recipe yields no rows", where=f"recipe '{recipe.recipe}'", fix="check its source")
    facts = tally.facts() | {
        "bad_rows": quarantine.bad,
        "bad_by_place": dict(quarantine.by_place),
        "moments": {name: {"mean": m.mean, "std": m.std} for name, m in moments.items()},
        "inputs": [_fingerprint(path) for path in recipe.inputs()],
    }
    facts |= recipe.facts()
    writer.finish(facts | {"seconds": round(clock.seconds, 3)})


def bad_rows(chunk: Chunk, parsed: Parsed) -> Iterator[BadRow]:
    """The rows of a chunk that parsing found bad, with their place of origin and their values as JSON."""
    for position, reason in parsed.bad:
        values = chunk.table.slice(position, 1).to_pylist()[0]
        raw = json.dumps(values, ensure_ascii=False, default=str)
        yield BadRow(chunk.file, int(chunk.rows[position]), reason, raw)


def _learn(
    recipe: Recipe, schema: Schema, quarantine: Quarantine, clock: _Clock
) -> tuple[dict[str, Vocabulary], dict[str, Moments]]:
    """Vocabularies by table and moments by feature, from the good rows of the training split."""
    builders = {table.name: VocabularyBuilder(table) for table in schema.tables if table.ids == "vocabulary"}
    moments = {f.name: Moments() for f in schema.dense if f.transform == "standard"}
    rows = 0
    for chunk in recipe.chunks() if builders or moments else ():
        rows += chunk.table.num_rows
        if chunk.split == TRAIN:
            parsed = parse(chunk.table, schema)
            quarantine.add(chunk.table.num_rows + len(chunk.bad), [*chunk.bad, *bad_rows(chunk, parsed)])
            clean = parsed.table
            for key, table in schema.id_tables.items():
                if table in builders:
                    builders[table].add(_flat(clean.column(key).combine_chunks()))
            for name in moments:
                moments[name] = moments[name].add(clean.column(name).drop_null().to_numpy())
        clock.tell("vocabulary", rows)
    quarantine.path.unlink(missing_ok=True)  # the next pass lists the bad rows of all splits
    return {name: builder.build() for name, builder in builders.items()}, moments


def _flat(column: pa.Array) -> pa.Array:
    return pc.list_flatten(column) if pa.types.is_large_list(column.type) else column


def _in_use(schema: Schema, vocabularies: dict[str, Vocabulary]) -> Schema:
    """The schema with the rows that vocabularies use."""
    tables = [
        table.model_copy(update={"rows": vocabularies[table.name].rows}) if table.name in vocabularies else table
        for table in schema.tables
    ]
    return schema.model_copy(update={"tables": tuple(tables)})


def _options(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _fingerprint(path: Path) -> str:
    """Name, length, hash of the first and the last 64 KiB: cheap, blind only to edits in the middle of equal length."""
    try:
        with path.open("rb") as file:
            head = file.read(_SAMPLE_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _SAMPLE_BYTES, 0))
            return f"{path.name} {size} {xxh3_64_hexdigest(head + file.read())}"
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="give a readable file") from None


def _finished(recipe: Recipe, out: Path, overwrite: bool) -> Dataset | None:
    """The data set in ``out`` if it is the one asked for; None if it is to be made."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "dataset.json").is_file():
        raise ConfigError("exists and is no data set", where=str(out), fix="give a new folder")
    try:
        dataset = Dataset.open(out)
    except DataError:
        if overwrite:
            return None
        raise
    difference = _difference(recipe, dataset)
    if difference and not overwrite:
        raise ConfigError(
            f"holds another data set: {difference}", where=str(out), fix="give another folder, or ask to overwrite"
        )
    return None if difference else dataset


def _difference(recipe: Recipe, dataset: Dataset) -> str:
    """How the data set in place differs from the one asked for; empty if it does not."""
    made = dataset.manifest
    if made.recipe != recipe.recipe:
        return f"recipe '{made.recipe}', not '{recipe.recipe}'"
    options = _options(recipe)
    for key in sorted({*options, *made.options}):
        if options.get(key) != made.options.get(key):
            return f"option {key}={made.options.get(key)!r}, not {options.get(key)!r}"
    if made.facts.get("inputs") != [_fingerprint(path) for path in recipe.inputs()]:
        return "its input files have changed since"
    return ""
