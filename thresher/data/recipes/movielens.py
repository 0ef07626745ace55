"""MovieLens ratings in the spellings GroupLens published.

100K        u.data (tabs), u.user and u.item (bars, Latin-1)
1M, 10M     ratings.dat, users.dat, movies.dat (``::``, Latin-1)
20M, 25M    ratings.csv, movies.csv (commas, quotes, a header)

Side files are joined where they lie beside the ratings. A CSV that carries all columns itself is read as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from thresher.data.recipes.base import Chunk, divide
from thresher.data.recipes.from_files import HeldOut, IdTables, rows_of
from thresher.data.recipes.joins import SideTable, bad_of
from thresher.data.recipes.screen import integers, need, need_floats, need_integers
from thresher.data.recipes.sequences import Interactions, joined, leave_one_out, next_item_schema, too_short
from thresher.data.schema import Group, Label, Schema, SparseFeature, Time
from thresher.data.sources import Layout, Part, choose_file, header, read_delimited, require

_RATING = ("user_id", "item_id", "rating", "timestamp")
_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_ITEM_100K = ("item_id", "title", "released", "video_released", "url", *_GENRES_100K)
_ALIASES = {"userId": "user_id", "movieId": "item_id", "movie_id": "item_id", "zip": "zip_code"}
_USER_IDS = ("gender", "age", "occupation", "zip_code")


@dataclass(frozen=True)
class _Spelling:
    ratings: str
    layout: Layout
    users: tuple[str, Layout] | None
    items: tuple[str, Layout]


def _latin(delimiter: str, *columns: str) -> Layout:
    return Layout(delimiter, columns, encoding="latin-1")


_CSV = Layout(",", quoted=True)
_SPELLINGS = (
    _Spelling(
        "u.data",
        Layout("\t", _RATING),
        ("u.user", _latin("|", "user_id", "age", "gender", "occupation", "zip_code")),
        ("u.item", _latin("|", *_ITEM_100K)),
    ),
    _Spelling(
        "ratings.dat",
        Layout("::", _RATING),
        ("users.dat", _latin("::", "user_id", "gender", "age", "occupation", "zip_code")),
        ("movies.dat", _latin("::", "item_id", "title", "genres")),
    ),
    _Spelling("ratings.csv", _CSV, None, ("movies.csv", _CSV)),
)


class MovieLens(IdTables, HeldOut):
    """Task ``ctr``: is a rating at least ``threshold``, from user, item, and what side files tell. Task ``next``: the
    next item of each user in order of time (see ``sequences``).

    Attributes:
        task: ``ctr`` or ``next``.
        threshold: ratings from which on the label is 1.
        split: ``ctr`` only: ``random``: by a hash of the row number; ``time``: the newest rows are held out.
        max_length: ``next`` only: histories keep their newest items.
    """

    recipe: ClassVar[str] = "movielens"
    summary: ClassVar[str] = "MovieLens ratings: u.data, ratings.dat or ratings.csv, with side files"

    ids: Literal["hash", "vocabulary", "raw"] = "vocabulary"
    task: Literal["ctr", "next"] = "ctr"
    threshold: float = 4.0
    split: Literal["random", "time"] = "random"
    max_length: int = Field(default=200, ge=1)

    def data_schema(self) -> Schema:
        if self.task == "next":
            tables = (self.table("item_id"), self.table("user_id"))
            return next_item_schema("movielens", *tables, self.max_length, timed=True)
        ids = ["user_id", "item_id", *(name for name in _USER_IDS if name in self._known)]
        features = [SparseFeature(name=name, table=name) for name in ids]
        if "genres" in self._known:
            features.append(SparseFeature(name="genres", table="genres", many=True))
        return Schema(
            name="movielens",
            tables=tuple(self.table(feature.table) for feature in features),
            features=(Label(name="label"), *features, Time(name="time"), Group(name="group")),
        )

    def inputs(self) -> tuple[Path, ...]:
        sides = (self._beside(self._spelling.users), self._beside(self._spelling.items))
        return (self._ratings, *(path for files in sides for path in files))

    def chunks(self) -> Iterator[Chunk]:
        if self.task == "next":
            yield from leave_one_out(self._log())
            return
        by_time = self.split == "time"
        cuts = self.cuts(integers(part.table, "timestamp") for part in self._parts()) if by_time else (0.0, 0.0)
        for part in self._parts():
            time = integers(part.table, "timestamp")
            which = self.by_time(time, cuts) if by_time else self.at_random(0, part.rows)
            yield from divide(rows_of(part, "train", self._columns(part.table)), which)

    def facts(self) -> dict[str, Any]:
        return {"users_left_out": too_short(self._log())} if self.task == "next" else {}

    def _log(self) -> Interactions:
        return joined([_interactions(part) for part in self._parts()])

    @cached_property
    def _ratings(self) -> Path:
        return choose_file(self.source, [s.ratings for s in _SPELLINGS] + ["*.csv"], "file of ratings")

    @property
    def _spelling(self) -> _Spelling:
        return next((s for s in _SPELLINGS if s.ratings == self._ratings.name), _SPELLINGS[-1])

    def _beside(self, side: tuple[str, Layout] | None) -> tuple[Path, ...]:
        path = self._ratings.parent / side[0] if side else None
        return (path,) if path and path.is_file() else ()

    @cached_property
    def _sides(self) -> tuple[SideTable, ...]:
        sides = []
        for key, side in (("user_id", self._spelling.users), ("item_id", self._spelling.items)):
            if side and self._beside(side):
                sides.append(SideTable.read(self._beside(side), side[1], _spelled(side, key)))
        return tuple(side.renamed(_ALIASES) for side in sides if side)

    @cached_property
    def _known(self) -> set[str]:
        """Columns of the ratings and of the side files, genres of the 100K set as ``genres``."""
        layout = self._spelling.layout
        names = [_ALIASES.get(name, name) for name in layout.columns or header(self._ratings, layout)]
        known = {*names, *(column for side in self._sides for column in side.columns)}
        return known | {"genres"} if "Action" in known else known

    def _parts(self) -> Iterator[Part]:
        bad = bad_of(self._sides)
        layout = self._spelling.layout
        names = layout.columns or header(self._ratings, layout, ("rating", "timestamp"))
        require(self._ratings, [_ALIASES.get(name, name) for name in names], _RATING)
        for part in read_delimited(self._ratings, layout):
            table = part.table.rename_columns([_ALIASES.get(name, name) for name in part.table.column_names])
            part = need(replace(part, table=table, bad=(*bad, *part.bad)), "user_id", "item_id")
            yield need_integers(need_floats(part, "rating"), "timestamp")
            bad = ()

    def _columns(self, table: pa.Table) -> pa.Table:
        table = table.append_column("label", pc.greater_equal(table.column("rating"), self.threshold).cast(pa.int8()))
        table = table.append_column("time", table.column("timestamp")).append_column("group", table.column("user_id"))
        for side in self._sides:
            table = side.join(table)
        if "Action" in table.column_names:
            return table.append_column("genres", _genres(table))
        if "genres" in table.column_names:
            at = table.column_names.index("genres")
            return table.set_column(at, "genres", pc.split_pattern(table.column("genres"), "|"))
        return table


def _spelled(side: tuple[str, Layout], key: str) -> str:
    """How a side file spells ``key``: the CSV files write ``movieId``."""
    return key if side[1].columns else next(raw for raw, name in _ALIASES.items() if name == key)


def _genres(table: pa.Table) -> pa.Array:
    """The 19 flags of the 100K set as lists of names."""
    flags = pl.DataFrame(pl.from_arrow(table.select(_GENRES_100K)))
    names = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in _GENRES_100K]
    return flags.select(pl.concat_list(names).list.drop_nulls()).to_series().to_arrow()


def _interactions(part: Part) -> Interactions:
    user, item = (part.table.column(name).combine_chunks() for name in ("user_id", "item_id"))
    return Interactions((part.file,), part.rows, user, item, integers(part.table, "timestamp"), bad=part.bad)
