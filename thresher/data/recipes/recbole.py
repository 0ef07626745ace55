"""RecBole's atomic files: tab-separated, the header gives ``name:type`` for each column.

NAME.inter   interactions, for instance   user_id:token  item_id:token  rating:float  timestamp:float
NAME.user    what is known of users       user_id:token  age:token ...          optional, as
NAME.item    what is known of items       item_id:token  class:token_seq ...    this one

Types: ``token`` (an id), ``token_seq`` (ids parted by spaces), ``float``, ``float_seq``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from thresher.data.recipes.base import Chunk, divide
from thresher.data.recipes.from_files import HeldOut, IdTables, Names, rows_of
from thresher.data.recipes.joins import SideTable, bad_of
from thresher.data.recipes.screen import integers, need, need_floats
from thresher.data.recipes.sequences import (
    HISTORY,
    ITEM,
    USER,
    Interactions,
    joined,
    leave_one_out,
    next_item_schema,
    too_short,
)
from thresher.data.schema import DenseFeature, Feature, Group, Label, Schema, SparseFeature, Time
from thresher.data.sources import Layout, Part, choose_file, header, read_delimited, require
from thresher.errors import ConfigError, SchemaError, nearest

_TYPES = ("token", "token_seq", "float", "float_seq")
_LABEL, _TIME, _GROUP = "label", "time", "group"


@dataclass(frozen=True)
class _Columns:
    """The columns of one atomic file: raw header to name, and name to type."""

    names: dict[str, str]
    types: dict[str, str]

    @classmethod
    def of(cls, path: Path) -> "_Columns":
        names, types = {}, {}
        for raw in header(path, Layout()):
            name, colon, kind = raw.rpartition(":")
            if not colon:
                raise SchemaError(f"column '{raw}' has no type", where=str(path), fix="write name:type in the header")
            if kind not in _TYPES:
                raise SchemaError(f"column '{raw}' is of no known type", where=str(path), fix=nearest(kind, _TYPES))
            names[raw] = re.sub(r"\W", "_", name)
            types[names[raw]] = kind
        return cls(names, types)


class RecBole(IdTables, HeldOut):
    """Task ``ctr``: a label from all columns of the three files. Task ``next``: the next item of each user, in order of
    time, or of the file where it has no time (see ``sequences``); token columns of the items stand beside them.

    Attributes:
        task: ``auto`` takes ``ctr`` where interactions have a label or a rating, else ``next``.
        user, item, timestamp: names of those columns.
        label: the column to predict; empty: ``label`` or ``rating``, whichever there is.
        threshold: values from which on the label is 1; a column called ``label`` is taken as it is.
        ignore: columns to leave out.
        split: ``ctr`` only: ``random``: by a hash of the row number; ``time``: the newest rows are held out.
        max_length: ``next`` only: histories keep their newest items.
    """

    recipe: ClassVar[str] = "recbole"
    summary: ClassVar[str] = "RecBole .inter files with .user and .item: click-through rate or next item"

    ids: Literal["hash", "vocabulary", "raw"] = "vocabulary"
    task: Literal["auto", "ctr", "next"] = "auto"
    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    label: str = ""
    threshold: float = 4.0
    ignore: Names = ()
    split: Literal["random", "time"] = "random"
    max_length: int = Field(default=50, ge=1)

    def data_schema(self) -> Schema:
        if self._task == "next":
            item, user = self.table(self.item), self.table(self.user)
            side = {name: self.table(name) for name in self._item_tokens}
            return next_item_schema("recbole", item, user, self.max_length, side, timed=self._timed)
        features: list[Feature] = [Label(name=_LABEL)]
        for name, kind in self._features.items():
            if kind == "float":
                features.append(DenseFeature(name=name))
            else:
                features.append(SparseFeature(name=name, table=name, many=kind == "token_seq"))
        tables = tuple(self.table(feature.table) for feature in features if isinstance(feature, SparseFeature))
        times = [Time(name=_TIME)] if self._timed else []
        return Schema(name="recbole", tables=tables, features=(*features, *times, Group(name=_GROUP)))

    def inputs(self) -> tuple[Path, ...]:
        return (self._inter, *self._beside.values())

    def chunks(self) -> Iterator[Chunk]:
        if self._task == "next":
            yield from leave_one_out(self._log())
            return
        if self.split == "time" and not self._timed:
            raise ConfigError(f"no column '{self.timestamp}'", where="split=time", fix="use split=random")
        by_time = self.split == "time"
        cuts = self.cuts(integers(part.table, _TIME) for part in self._parts()) if by_time else (0.0, 0.0)
        for part in self._parts():
            which = self.by_time(integers(part.table, _TIME), cuts) if by_time else self.at_random(0, part.rows)
            yield from divide(rows_of(part, "train", self._columns(part.table)), which)

    def facts(self) -> dict[str, Any]:
        return {"users_left_out": too_short(self._log())} if self._task == "next" else {}

    def _log(self) -> Interactions:
        return joined([self._interactions(part) for part in self._parts()])

    @cached_property
    def _inter(self) -> Path:
        return choose_file(self.source, ("*.inter",), "file of interactions")

    @cached_property
    def _beside(self) -> dict[str, Path]:
        """Side files by the column that joins them."""
        files = {self.user: self._inter.with_suffix(".user"), self.item: self._inter.with_suffix(".item")}
        return {key: path for key, path in files.items() if path.is_file()}

    @cached_property
    def _own(self) -> _Columns:
        columns = _Columns.of(self._inter)
        require(self._inter, list(columns.types), (self.user, self.item, *([self.label] if self.label else [])))
        return columns

    @cached_property
    def _side_columns(self) -> dict[str, _Columns]:
        return {key: _Columns.of(path) for key, path in self._beside.items()}

    @cached_property
    def _sides(self) -> tuple[SideTable, ...]:
        sides = []
        for key, path in self._beside.items():
            columns = self._side_columns[key]
            require(path, list(columns.types), (key,))
            raw = {name: raw for raw, name in columns.names.items()}
            wanted = [raw[name] for name in columns.types if name != key and name not in self.ignore]
            side = SideTable.read((path,), Layout(), raw[key], wanted)
            sides += [side.renamed(columns.names)] if side and wanted else []
        return tuple(sides)

    @cached_property
    def _target(self) -> str:
        """The column that the label comes from; empty if there is none."""
        return self.label or next((name for name in ("label", "rating") if name in self._own.types), "")

    @cached_property
    def _task(self) -> str:
        if self.task == "ctr" and not self._target:
            raise SchemaError("no column 'label' or 'rating'", where=str(self._inter), fix="use task=next, or name it")
        return self.task if self.task != "auto" else ("ctr" if self._target else "next")

    @property
    def _timed(self) -> bool:
        return self.timestamp in self._own.types

    @cached_property
    def _features(self) -> dict[str, str]:
        """Type of each column that becomes a feature, those of the side files last."""
        left_out = {self._target, self.timestamp, *self.ignore}
        columns = {name: kind for name, kind in self._own.types.items() if name not in left_out}
        self._refuse(set(columns) & {_LABEL, _TIME, _GROUP}, self._inter)
        for key, side in self._side_columns.items():
            known = {name: kind for name, kind in side.types.items() if name not in (key, *self.ignore)}
            self._refuse(set(known) & {*self._own.types, *columns, _LABEL, _TIME, _GROUP}, self._beside[key])
            columns |= known
        for name, kind in columns.items():
            if kind == "float_seq":
                raise SchemaError(
                    f"column '{name}' is a float_seq, which no feature holds",
                    where=str(self._inter),
                    fix=f"leave it out: ignore={name}",
                )
        return columns

    @cached_property
    def _item_tokens(self) -> tuple[str, ...]:
        """Token columns of the items, for sequences."""
        side = self._side_columns.get(self.item)
        known = side.types.items() if side else ()
        names = [n for n, kind in known if kind == "token" and n != self.item and n not in self.ignore]
        self._refuse({*names} & {*self._own.types, HISTORY, ITEM, USER, _GROUP, _TIME}, self._inter)
        return tuple(names)

    def _refuse(self, taken: set[str], path: Path) -> None:
        if taken:
            name = min(taken)
            raise SchemaError(
                f"the name of column '{name}' is taken", where=str(path), fix=f"rename it, or ignore={name}"
            )

    def _parts(self) -> Iterator[Part]:
        bad = bad_of(self._sides)
        for part in read_delimited(self._inter, Layout()):
            table = part.table.rename_columns([self._own.names[name] for name in part.table.column_names])
            part = need(replace(part, table=table, bad=(*bad, *part.bad)), self.user, self.item)
            bad = ()
            yield self._with_time(part) if self._timed else part

    def _with_time(self, part: Part) -> Part:
        part = need_floats(part, self.timestamp)
        seconds = np.floor(part.table.column(self.timestamp).to_numpy()).astype(np.int64)
        return replace(part, table=part.table.append_column(_TIME, pa.array(seconds)))

    def _columns(self, table: pa.Table) -> pa.Table:
        table = _put(table, _LABEL, self._label(table.column(self._target)))
        table = _put(table, _GROUP, table.column(self.user))
        for side in self._sides:
            table = side.join(table)
        for name, kind in self._features.items():
            if kind == "token_seq":
                table = _put(table, name, pc.split_pattern(table.column(name), " "))
        return table

    def _label(self, raw: pa.ChunkedArray) -> pa.ChunkedArray:
        if self._target == "label":
            return raw
        numbers = pc.if_else(pc.match_substring_regex(raw, r"^[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"), raw, None)
        return pc.greater_equal(numbers.cast(pa.float64()), self.threshold).cast(pa.int8())

    def _interactions(self, part: Part) -> Interactions:
        table = part.table
        for side in self._sides:
            table = side.join(table) if side.key == self.item else table
        user, item, *side_ids = (
            table.column(name).combine_chunks() for name in (self.user, self.item, *self._item_tokens)
        )
        time = integers(table, _TIME) if self._timed else np.empty(0, np.int64)
        sides = dict(zip(self._item_tokens, side_ids, strict=True))
        return Interactions((part.file,), part.rows, user, item, time, sides, part.bad)


def _put(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    """Adds or replaces a column."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)
