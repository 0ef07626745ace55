"""Task ``next``: which product does a household buy next? Leave one out, by time, in every household.

purchases of a household      a b c d e f g h        stride 3, history 4
test     history d e f g      item h                 the last purchase
valid    history c d e f      item g                 the one before
train    history b c d e      item f                 the one before that, then every ``stride`` purchases back
         history a b          item c
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from thresher.data.recipes.base import SPLITS, Chunk
from thresher.data.recipes.journey_rank import history_feature, vocabulary
from thresher.data.recipes.purchases import Ints, Log, Past, history, spans
from thresher.data.schema import Group, Schema, SparseFeature, Time

_ROWS_A_CHUNK = 1 << 15


def next_schema(length: int) -> Schema:
    """Tables and features of the task."""
    return Schema(
        name="completejourney_next",
        tables=tuple(vocabulary(name) for name in ("household", "product", "category", "department")),
        features=(
            SparseFeature(name="household", table="household"),
            SparseFeature(name="item", table="product"),
            history_feature(length),
            Time(name="time"),
            Group(name="group"),
        ),
    )


def next_chunks(log: Log, length: int, stride: int) -> Iterator[Chunk]:
    """Rows of every split. Purchases of one basket follow each other in the order of the source."""
    past = Past(log.household, log.time)
    for split, positions in zip(SPLITS, _targets(log, stride), strict=True):
        for part in spans(len(positions), _ROWS_A_CHUNK):
            chosen = positions[part]
            yield Chunk(split, _table(log, past, chosen, length), "transactions.parquet", log.row[chosen])


def _targets(log: Log, stride: int) -> tuple[Ints, Ints, Ints]:
    """Positions of the purchases to predict in train, valid and test."""
    order = np.argsort(log.household, kind="stable")
    number = np.bincount(log.household)
    total = number[log.household[order]]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(number) - number, number)
    back = total - 1 - rank  # purchases that follow in the household
    period = stride or len(order)
    train = (back >= 2) & ((back - 2) % period == 0) & (rank >= 1)
    valid, test = ((back == left) & (rank >= 2) for left in (1, 0))
    return order[train], order[valid], order[test]


def _table(log: Log, past: Past, position: Ints, length: int) -> pa.Table:
    household, time = log.household[position], log.time[position]
    columns = {
        "household": log.named("household", household),
        "item": log.named("product", log.product[position]),
        "time": time,
        "group": log.names["household"].to_numpy()[household],
    }
    return pa.table(columns | history(log, past, household, position, time, length))
