"""Avazu click-through rates (Kaggle 2014): ``id, click, hour (YYMMDDHH), C1 ..``, 24 columns of comma-separated text.

Read as well: pieces without a header, compressed files, and the 21-column copies in circulation (hour of the day only,
neither ``id`` nor ``device_ip``) whose clicks lie in a second file, one a line.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from thresher.data.recipes.base import Chunk, divide
from thresher.data.recipes.from_files import HeldOut, IdTables, Sources, rows_of
from thresher.data.recipes.screen import integers, need, set_aside
from thresher.data.schema import Label, Schema, SparseFeature, Time
from thresher.data.sources import Layout, Part, choose_files, first_line, header, read_delimited, require
from thresher.errors import ConfigError, DataError, SchemaError

_SITE = ("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category")
_DEVICE = ("device_id", "device_ip", "device_model", "device_type", "device_conn_type")
_IDS = (*_SITE, *_DEVICE, *(f"C{i}" for i in range(14, 22)))
_COLUMNS = ("id", "click", "hour", *_IDS)
_KNOWN_FILES = ("train.csv", "train.csv.gz", "train", "train.gz")


class Avazu(IdTables, HeldOut):
    """Every column but ``id`` is an id with its own table; ``hour`` becomes ``hour_of_day``, ``weekday`` and ``time``.

    Attributes:
        clicks: files of clicks, one for each of ``source``, for copies without a column ``click``.
        split: ``random``: by a hash of the row number; ``time``: the newest rows are held out.
    """

    recipe: ClassVar[str] = "avazu"
    summary: ClassVar[str] = "Avazu click logs, 24 or 21 columns of CSV"

    clicks: Sources = Field(default=(), exclude=True)
    split: Literal["random", "time"] = "random"

    @model_validator(mode="after")
    def _paired(self) -> "Avazu":
        if self.clicks and len(self.clicks) != len(self.source):
            raise ValueError(f"{len(self.clicks)} files of clicks for {len(self.source)} of source")
        return self

    def data_schema(self) -> Schema:
        moment = ("hour_of_day", "weekday") if self._dated else ("hour_of_day",)
        ids = [*moment, *(name for name in _IDS if name in self._columns)]
        return Schema(
            name="avazu",
            tables=tuple(self.table(name) for name in ids),
            features=(
                Label(name="click"),
                *(SparseFeature(name=name, table=name) for name in ids),
                *([Time(name="time")] if self._dated else []),
            ),
        )

    def inputs(self) -> tuple[Path, ...]:
        return (*self._files, *self.clicks)

    def chunks(self) -> Iterator[Chunk]:
        if self.split == "time" and not self._dated:
            raise ConfigError("the files give hours, no dates", where="split=time", fix="use split=random")
        by_time = self.split == "time"
        cuts = self.cuts(integers(p.table, "time") for _, p in self._parts()) if by_time else (0.0, 0.0)
        for number, part in self._parts():
            which = self.by_time(integers(part.table, "time"), cuts) if by_time else self.at_random(number, part.rows)
            yield from divide(rows_of(part, "train"), which)

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        return choose_files(self.source, _KNOWN_FILES, "Avazu file")

    @cached_property
    def _columns(self) -> tuple[str, ...]:
        """The columns of the first file, which all must have."""
        return _columns_of(self._files[0])

    @cached_property
    def _dated(self) -> bool:
        """Whether ``hour`` holds a date too."""
        parts = read_delimited(self._files[0], _layout(self._files[0]))
        hours = next(part.table.column("hour") for part in parts if part.table.num_rows)
        return bool(pc.any(pc.greater(pc.utf8_length(hours), 2)).as_py())

    def _parts(self) -> Iterator[tuple[int, Part]]:
        for number, path in enumerate(self._files):
            clicks = _Clicks(self.clicks[number], path) if self.clicks else None
            require(path, _columns_of(path), self._columns)
            if clicks is None and "click" not in self._columns:
                raise SchemaError("no column 'click'", where=str(path), fix="give their file: clicks=PATH")
            for part in read_delimited(path, _layout(path)):
                labelled = clicks.join(part) if clicks else part
                yield number, (_dated if self._dated else _hours)(need(labelled, "hour"))
            if clicks:
                clicks.check_end()


class _Clicks:
    """A file with a header and one click a line, joined to another file by line number."""

    def __init__(self, path: Path, other: Path) -> None:
        self._path, self._other = path, other
        parts = list(read_delimited(path, Layout(delimiter=","), ("click",)))
        self._rows = np.concatenate([part.rows for part in parts])
        self._click = pa.concat_tables([part.table for part in parts]).column("click").combine_chunks()
        self._bad = tuple(row for part in parts for row in part.bad)
        self._last = 0

    def join(self, part: Part) -> Part:
        """``part`` with a column ``click``, null where the file of clicks has none."""
        at = np.minimum(np.searchsorted(self._rows, part.rows), len(self._rows) - 1)
        found = self._rows[at] == part.rows
        click = self._click.take(pa.array(at, mask=~found))
        self._last = max(self._last, int(part.rows.max(initial=0)))
        return replace(part, table=part.table.append_column("click", click))

    def check_end(self) -> None:
        """Raises if the files have different lengths.

        Raises:
            DataError: names both files and their last lines.
        """
        end = int(self._rows[-1])
        if end != self._last:
            raise DataError(
                f"ends at line {end}, but {self._other} at line {self._last}",
                where=str(self._path),
                fix="give the clicks of the same rows",
            )


def _columns_of(path: Path) -> tuple[str, ...]:
    layout = _layout(path)
    return layout.columns or header(path, layout, [name for name in ("hour", *_IDS) if name != "device_ip"])


def _layout(path: Path) -> Layout:
    return Layout(delimiter=",", columns=() if "hour" in first_line(path).lower() else _COLUMNS)


def _dated(part: Part) -> Part:
    """Adds ``time``, ``hour_of_day`` and ``weekday`` (0 is Monday) from YYMMDDHH."""
    moment = pc.strptime(part.table.column("hour"), format="%y%m%d%H", unit="s", error_is_null=True)
    bad = np.asarray(moment.is_null().to_numpy(), dtype=np.bool_)
    part = set_aside(part, bad, "hour", "{} is no YYMMDDHH")
    moment = moment.drop_null()
    table = part.table.append_column("time", moment.cast(pa.int64()))
    table = table.append_column("hour_of_day", pc.hour(moment)).append_column("weekday", pc.day_of_week(moment))
    return replace(part, table=table)


def _hours(part: Part) -> Part:
    """Adds ``hour_of_day`` from HH."""
    good = pc.match_substring_regex(part.table.column("hour"), r"^([01]?[0-9]|2[0-3])$")
    part = set_aside(part, _not(good), "hour", "{} is no hour of the day")
    return replace(part, table=part.table.append_column("hour_of_day", part.table.column("hour").cast(pa.int64())))


def _not(mask: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(pc.invert(mask).to_numpy(), dtype=np.bool_)
