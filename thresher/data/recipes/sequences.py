"""Next-item prediction: each user's interactions as one sequence, the last ones held out (leave-one-out).

    user's items, oldest first     a b c d e
    train   history a b        item c
    valid   history a b c      item d
    test    history a b c d    item e

A row needs one item of history at least: users of 2 items are tested only, users of 1 are left out. A sequence model
that predicts every position of a history learns from each transition of the training rows once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thresher.data.quarantine import BadRow
from thresher.data.recipes.base import SPLITS, Chunk
from thresher.data.schema import Group, Schema, SequenceFeature, SideColumn, SparseFeature, Table, Time

HISTORY, ITEM, USER, GROUP, TIME = "history", "item", "user", "group", "time"
_USERS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Interactions:
    """n interactions of users with items, any order of users; each user's own are in order if ``time`` is empty.

    Attributes:
        files: where they stand, usually one file.
        rows: [n] int64, their row numbers in their file.
        user, item: [n] strings or integers.
        time: [n] int64 seconds since 1970; empty: none known.
        side: further [n] columns by name: ids (strings or integers) that describe the item or the interaction.
        bad: rows that could not be read.
        origin: [n] positions in ``files``; empty: all stand in the first.
    """

    files: tuple[str, ...]
    rows: NDArray[np.int64]
    user: pa.Array
    item: pa.Array
    time: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    side: Mapping[str, pa.Array] = field(default_factory=dict)
    bad: tuple[BadRow, ...] = ()
    origin: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def next_item_schema(
    name: str, items: Table, users: Table, max_length: int, side: Mapping[str, Table] = {}, timed: bool = False
) -> Schema:
    """The schema of next-item rows.

    Args:
        items, users: tables of items (targets and histories share it) and of users.
        max_length: histories keep their newest items.
        side: tables of the side columns, by column.
        timed: rows carry the target's time.
    """
    columns = tuple(SideColumn(name=column, table=table.name) for column, table in side.items())
    tables = {table.name: table for table in (items, users, *side.values())}
    return Schema(
        name=name,
        tables=tuple(tables.values()),
        features=(
            SparseFeature(name=USER, table=users.name),
            SparseFeature(name=ITEM, table=items.name),
            *(SparseFeature(name=column, table=table.name) for column, table in side.items()),
            SequenceFeature(name=HISTORY, table=items.name, max_length=max_length, side=columns),
            Group(name=GROUP),
            *([Time(name=TIME)] if timed else []),
        ),
    )


def leave_one_out(interactions: Interactions) -> Iterator[Chunk]:
    """Rows of all three splits, users in order of first appearance; a row's file and number are those of its target.

    Columns: ``user``, ``item``, ``history``, ``group`` (the user), ``time`` if known; side columns under their names
    for the target and under ``history.<name>`` for the history.
    """
    order, lengths = _by_user(interactions)
    starts = np.cumsum(lengths) - lengths
    none = np.empty(0, np.int64)
    if interactions.bad:
        yield _chunk(interactions, SPLITS[0], 0, order, none, none, interactions.bad)
    for first in range(0, len(lengths), _USERS_AT_ONCE):
        some = slice(first, first + _USERS_AT_ONCE)
        for held_back, split in enumerate(reversed(SPLITS), start=1):
            chosen = np.flatnonzero(lengths[some] > held_back) + first
            histories = lengths[chosen] - held_back
            origin = _origin(interactions, order[starts[chosen] + histories])
            for file in np.unique(origin).tolist():
                here = origin == file
                yield _chunk(interactions, split, file, order, starts[chosen][here], histories[here])


def too_short(interactions: Interactions) -> int:
    """Users of a single interaction, who appear in no split."""
    return int((_by_user(interactions)[1] < 2).sum())


def _by_user(interactions: Interactions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[n] positions of interactions user by user, each oldest first; [users] how many each has."""
    codes = interactions.user.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    keys = (interactions.time, codes) if len(interactions.time) else (codes,)
    return np.lexsort(keys), np.bincount(codes)


def _origin(interactions: Interactions, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return interactions.origin[positions] if len(interactions.origin) else np.zeros(len(positions), np.int64)


def _chunk(
    interactions: Interactions,
    split: str,
    file: int,
    order: NDArray[np.int64],
    starts: NDArray[np.int64],
    histories: NDArray[np.int64],
    bad: tuple[BadRow, ...] = (),
) -> Chunk:
    """A row a user: the target stands ``histories`` places behind ``starts`` in ``order``, its history before it."""
    target = order[starts + histories]
    ends = np.cumsum(histories)
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], histories)
    past = pa.array(order[np.repeat(starts, histories) + within])
    take = pa.array(target)
    columns = {
        USER: interactions.user.take(take),
        ITEM: interactions.item.take(take),
        HISTORY: pa.LargeListArray.from_arrays(offsets, interactions.item.take(past)),
    }
    columns[GROUP] = columns[USER]
    if len(interactions.time):
        columns[TIME] = pa.array(interactions.time[target])
    for name, values in interactions.side.items():
        columns[name] = values.take(take)
        columns[f"{HISTORY}.{name}"] = pa.LargeListArray.from_arrays(offsets, values.take(past))
    return Chunk(split, pa.table(columns), interactions.files[file], interactions.rows[target], bad)


def joined(parts: list[Interactions]) -> Interactions:
    """Interactions read in pieces, of one file each, as one: at least one piece."""
    files = tuple(dict.fromkeys(part.files[0] for part in parts))
    return Interactions(
        files,
        np.concatenate([part.rows for part in parts]),
        pa.concat_arrays([part.user for part in parts]),
        pa.concat_arrays([part.item for part in parts]),
        np.concatenate([part.time for part in parts]),
        {name: pa.concat_arrays([part.side[name] for part in parts]) for name in parts[0].side},
        tuple(row for part in parts for row in part.bad),
        np.repeat([files.index(part.files[0]) for part in parts], [len(part.rows) for part in parts]),
    )
