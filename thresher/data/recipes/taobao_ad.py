"""Taobao display advertising, clicks only: ``train.txt`` and ``test.txt`` (``user item item ...`` a line), ``u.user``
(eight profile fields a user) and ``u.item`` (category, brand and price level an item), parted by spaces.

The files hold positives only. Negatives are drawn for each from the items that its user clicked in neither split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from thresher.data.hashing import uniform
from thresher.data.quarantine import BadRow
from thresher.data.recipes.base import Chunk, divide
from thresher.data.recipes.from_files import FILE_STRIDE, FromFiles, IdTables, Share
from thresher.data.recipes.joins import SideTable, bad_of
from thresher.data.recipes.sequences import Interactions, joined
from thresher.data.recipes.user_item import interactions
from thresher.data.schema import Group, Label, Schema, SparseFeature
from thresher.data.sources import Layout, find_file, first_line, read_lines
from thresher.errors import DataError

USER_FIELDS = (
    *("cms_segid", "cms_group_id", "final_gender_code", "age_level", "pvalue_level", "shopping_level", "occupation"),
    "new_user_class_level",
)
ITEM_FIELDS = ("cate_id", "brand", "price")
_SPLITS = ("train", "test")
_ROUNDS = 64
_CLICKS_AT_ONCE = 1 << 14

Ints = NDArray[np.int64]


class TaobaoAd(IdTables, FromFiles):
    """Clicks as positives, ``negatives`` drawn items for each; splits as given, valid a random share of train's clicks.

    A negative's file, line and split are those of its click. A user who clicked nearly every item may get fewer.

    Attributes:
        valid: share of the training clicks held out for ``valid``.
        negatives: drawn items a click.
        sampling: ``popularity``: in proportion to clicks in both files; ``uniform``: every clicked item alike.
        seed: of the negatives and of the valid split.
    """

    recipe: ClassVar[str] = "taobao_ad"
    summary: ClassVar[str] = "Taobao ad clicks with profiles: negatives are sampled"

    ids: Literal["hash", "vocabulary", "raw"] = "vocabulary"
    valid: Share = 0.1
    negatives: int = Field(default=4, ge=1, le=1000)
    sampling: Literal["popularity", "uniform"] = "popularity"
    seed: int = 0

    def data_schema(self) -> Schema:
        ids = ("user", "item", *USER_FIELDS, *ITEM_FIELDS)
        return Schema(
            name="taobao_ad",
            tables=tuple(self.table(name) for name in ids),
            features=(
                Label(name="label"),
                *(SparseFeature(name=name, table=name) for name in ids),
                Group(name="group"),
            ),
        )

    def inputs(self) -> tuple[Path, ...]:
        if len(self.source) != 1:
            raise DataError(
                f"{len(self.source)} sources given", where="source", fix="give the folder of the four files"
            )
        names = {"train.txt": "training clicks", "test.txt": "test clicks", "u.user": "profiles", "u.item": "items"}
        return tuple(find_file(self.source[0], [name], what) for name, what in names.items())

    def chunks(self) -> Iterator[Chunk]:
        bad = bad_of(self._sides)
        for number, split in enumerate(_SPLITS):
            clicks = self._clicks[number]
            bad += clicks.bad
            for first in range(0, len(clicks.rows), _CLICKS_AT_ONCE):
                some = np.arange(first, min(first + _CLICKS_AT_ONCE, len(clicks.rows)))
                chunk, click = self._rows(number, split, some, bad)
                bad = ()
                held_out = uniform(click, self.seed + 1) < (self.valid if split == "train" else 0.0)
                yield from divide(chunk, held_out.astype(np.uint8)) if split == "train" else (chunk,)

    def facts(self) -> dict[str, Any]:
        return {"clicks": {split: len(clicks.rows) for split, clicks in zip(_SPLITS, self._clicks, strict=True)}}

    @cached_property
    def _clicks(self) -> tuple[Interactions, ...]:
        """The clicks of train and of test."""
        read = []
        for path in self.inputs()[:2]:
            read.append(joined([interactions(lines, str(path)) for lines in read_lines(path)]))
            if not len(read[-1].rows):
                raise DataError("holds no clicks", where=str(path), fix="give lines of 'user item item ...'")
        return tuple(read)

    @cached_property
    def _sides(self) -> tuple[SideTable, SideTable]:
        return (_side(self.inputs()[2], "user", USER_FIELDS), _side(self.inputs()[3], "item", ITEM_FIELDS))

    @cached_property
    def _pool(self) -> "_Pool":
        return _Pool.of(self._clicks, self.sampling)

    def _rows(self, number: int, split: str, some: Ints, bad: tuple[BadRow, ...]) -> tuple[Chunk, Ints]:
        """A chunk of some clicks and their negatives, and [n] which click each row belongs to."""
        clicks, pool = self._clicks[number], self._pool
        counter = (number * FILE_STRIDE + some[:, None]) * self.negatives + np.arange(self.negatives)
        user = np.repeat(pool.users[number][some], self.negatives)
        drawn = pool.draw(user, counter.ravel(), self.seed).reshape(len(some), self.negatives)
        item = np.concatenate([pool.items[number][some][:, None], drawn], axis=1)
        label = np.zeros(item.shape, np.int8)
        label[:, 0] = 1
        keep = item.ravel() >= 0
        click = np.repeat(some, self.negatives + 1)[keep]
        columns = {
            "label": pa.array(label.ravel()[keep]),
            "user": clicks.user.take(pa.array(click)),
            "item": pool.names.take(pa.array(item.ravel()[keep])),
        }
        table = pa.table(columns | {"group": columns["user"]})
        for side in self._sides:
            table = side.join(table)
        return Chunk(split, table, clicks.files[0], clicks.rows[click], bad), click


@dataclass(frozen=True)
class _Pool:
    """Clicked items, numbered, and who clicked what.

    Attributes:
        names: items by number.
        users, items: numbers of user and item of each click, by split.
        candidates: items to draw from, as often as their chance demands.
        clicked: ascending keys (user times number of items plus item) of all clicks.
    """

    names: pa.Array
    users: tuple[Ints, ...]
    items: tuple[Ints, ...]
    candidates: Ints
    clicked: Ints

    @classmethod
    def of(cls, clicks: tuple[Interactions, ...], sampling: str) -> "_Pool":
        cuts = [len(clicks[0].rows)]
        users = pa.concat_arrays([part.user for part in clicks]).dictionary_encode()
        items = pa.concat_arrays([part.item for part in clicks]).dictionary_encode()
        user, item = (codes.indices.to_numpy(zero_copy_only=False).astype(np.int64) for codes in (users, items))
        return cls(
            items.dictionary,
            tuple(np.split(user, cuts)),
            tuple(np.split(item, cuts)),
            item if sampling == "popularity" else np.unique(item),
            np.unique(user * len(items.dictionary) + item),
        )

    def draw(self, user: Ints, counter: Ints, seed: int) -> Ints:
        """[n] an item for each of [n] users that the user never clicked; -1 where chance found none in 64 tries."""
        drawn = np.full(len(user), -1, np.int64)
        for attempt in range(_ROUNDS):
            open_ = np.flatnonzero(drawn < 0)
            if not len(open_):
                break
            chance = uniform(counter[open_] * _ROUNDS + attempt, seed)
            item = self.candidates[(chance * len(self.candidates)).astype(np.int64)]
            key = user[open_] * len(self.names) + item
            at = np.minimum(np.searchsorted(self.clicked, key), len(self.clicked) - 1)
            drawn[open_] = np.where(self.clicked[at] == key, -1, item)
        return drawn


def _side(path: Path, key: str, fields: tuple[str, ...]) -> SideTable:
    """A side file without a header; in some copies each line ends with a space, which is no further column."""
    columns = (key, *fields, "nothing") if first_line(path).endswith(" ") else (key, *fields)
    side = SideTable.read((path,), Layout(" ", columns), key, fields)
    if side is None:
        raise DataError("holds no rows", where=str(path), fix="give lines of ids and fields")
    return side
