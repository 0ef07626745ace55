"""Task ``rank``: will this household buy this product in this basket? Purchases against drawn negatives."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thresher.data.hashing import uniform
from thresher.data.recipes.base import Chunk, by_threshold, divide, time_cuts
from thresher.data.recipes.journey_files import ATTRIBUTES, DEMOGRAPHICS, Journey
from thresher.data.recipes.negatives import Negatives
from thresher.data.recipes.purchases import Floats, Ints, Log, Past, history, spans
from thresher.data.schema import (
    DenseFeature,
    Group,
    Label,
    Schema,
    SequenceFeature,
    SideColumn,
    SparseFeature,
    Table,
    Time,
)
from thresher.settings import Settings

_POSITIVES_A_CHUNK = 1 << 13
_NEVER_DAYS = 400.0  # stands for "never before": more than the year of the data
_COUNTS = ("product_count", "category_count", "household_count", "popularity")
_DAYS = ("product_days", "category_days")
_ROWS = {"household": 2600, "product": 70_000, "type": 2600, "manufacturer": 6600, "package_size": 3800}
_FEW = 600


class RankOptions(Settings):
    """The options of ``CompleteJourney`` that concern this task, described there."""

    history: int
    sample: float
    negatives: int
    alpha: float
    warmup_weeks: int
    valid: float
    test: float
    seed: int


def history_feature(length: int) -> SequenceFeature:
    """The household's last purchases: products, with category, department and log(1 + age in days)."""
    side = (SideColumn(name="category", table="category"), SideColumn(name="department", table="department"))
    return SequenceFeature(name="history", table="product", max_length=length, side=(*side, SideColumn(name="age")))


def vocabulary(name: str) -> Table:
    """A vocabulary table with room for every value the data hold."""
    return Table(name=name, rows=_ROWS.get(name, _FEW), ids="vocabulary")


def rank_schema(length: int) -> Schema:
    """Tables and features of the task; see docs/data.md for what each means."""
    single = ("household", "product", *ATTRIBUTES, "store", *DEMOGRAPHICS, "weekday", "hour")
    never = float(np.log1p(_NEVER_DAYS))
    return Schema(
        name="completejourney_rank",
        tables=tuple(vocabulary(name) for name in (*single, "campaign")),
        features=(
            *(SparseFeature(name=name, table=name) for name in single),
            SparseFeature(name="campaigns", table="campaign", many=True),
            history_feature(length),
            *(DenseFeature(name=name, transform="log1p") for name in (*_COUNTS, "redemptions", "coupons")),
            *(DenseFeature(name=name, transform="log1p", fill=never) for name in _DAYS),
            Label(name="bought"),
            Time(name="time"),
            Group(name="group"),
        ),
    )


@dataclass(frozen=True)
class _Rows:
    """n examples: who, what, in the basket of which purchase, and whether it was bought."""

    position: Ints
    product: Ints
    bought: NDArray[np.float32]


def rank_chunks(journey: Journey, options: RankOptions) -> Iterator[Chunk]:
    """Positives in order of time, each followed by its negatives."""
    log = journey.log
    negatives = Negatives(log, options.alpha, options.seed)
    positions = np.flatnonzero(_eligible(log, options))
    positions = positions[negatives.known(positions)]
    cuts = _cuts(log, positions, options)
    columns = _Columns(journey, options.history)
    for part in spans(len(positions), _POSITIVES_A_CHUNK):
        rows = _examples(log, positions[part], negatives.draw(positions[part], options.negatives))
        chunk = Chunk("train", columns.table(rows), "transactions.parquet", log.row[rows.position])
        yield from divide(chunk, by_threshold(log.time[rows.position], *cuts))


def _eligible(log: Log, options: RankOptions) -> NDArray[np.bool_]:
    """[N] whether the purchase becomes an example: past the warm-up, and its basket is in the sample."""
    late = log.week >= log.week[0] + options.warmup_weeks
    return np.asarray(late & (uniform(log.basket, options.seed + 1) < options.sample), dtype=np.bool_)


def _cuts(log: Log, positions: Ints, options: RankOptions) -> tuple[float, float]:
    """Moments from which baskets are held out, so that no basket is divided."""
    first = np.unique(log.basket[positions], return_index=True)[1]
    return time_cuts(log.time[positions[first]], options.valid, options.test)


def _examples(log: Log, positions: Ints, drawn: Ints) -> _Rows:
    product = np.column_stack([log.product[positions], drawn])
    bought = np.zeros(product.shape, np.float32)
    bought[:, 0] = 1.0
    keep = product.ravel() >= 0
    return _Rows(np.repeat(positions, product.shape[1])[keep], product.ravel()[keep], bought.ravel()[keep])


class _Columns:
    """The raw columns of examples, every one from what was known before the basket."""

    def __init__(self, journey: Journey, length: int) -> None:
        self._journey, self._length = journey, length
        log = journey.log
        self._products = len(log.names["product"])
        self._category = log.attributes["category"] + 1
        self._categories = int(self._category.max()) + 1
        self._household = Past(log.household, log.time)
        self._product = Past(log.product, log.time)
        self._pair = Past(log.household * self._products + log.product, log.time)
        self._class = Past(log.household * self._categories + self._category[log.product], log.time)
        self._redeemed = Past(journey.redemption_household, journey.redemption_day)

    def table(self, rows: _Rows) -> pa.Table:
        """The raw table of n examples."""
        log = self._journey.log
        household, time = log.household[rows.position], log.time[rows.position]
        before = log.start(time)
        columns = self._context(rows, household, time) | self._product_columns(rows.product)
        columns |= self._counts(household, rows.product, before, time)
        columns |= self._offers(household, rows.product, time)
        columns |= history(log, self._household, household, before, time, self._length)
        columns |= {"bought": rows.bought, "time": time, "group": log.names["household"].to_numpy()[household]}
        return pa.table(columns)

    def _context(self, rows: _Rows, household: Ints, time: Ints) -> dict[str, pa.Array]:
        log = self._journey.log
        days = self._journey.demographics
        return {
            "household": log.named("household", household),
            "store": log.named("store", log.store[rows.position]),
            "weekday": (time // 86400 + 4) % 7,  # 1970-01-01 was a Thursday; 0 is Sunday
            "hour": time // 3600 % 24,
            **{name: days[name].take(pa.array(household)) for name in DEMOGRAPHICS},
        }

    def _product_columns(self, product: Ints) -> dict[str, pa.Array]:
        log = self._journey.log
        columns = {name: log.named(name, log.attributes[name][product]) for name in ATTRIBUTES}
        return columns | {"product": log.named("product", product)}

    def _counts(self, household: Ints, product: Ints, before: Ints, time: Ints) -> dict[str, pa.Array | Floats]:
        pair, pair_days = self._pair.count_and_days(household * self._products + product, before, time)
        key = household * self._categories + self._category[product]
        category, category_days = self._class.count_and_days(key, before, time)
        return {
            "product_count": pair,
            "category_count": category,
            "household_count": self._household.count(household, before),
            "popularity": self._product.count(product, before),
            "product_days": pa.array(pair_days, from_pandas=True),
            "category_days": pa.array(category_days, from_pandas=True),
        }

    def _offers(self, household: Ints, product: Ints, time: Ints) -> dict[str, pa.Array | Floats]:
        campaigns = self._journey.campaigns
        active = campaigns.active(household, time)
        offsets = np.concatenate([[0], np.cumsum(active.sum(axis=1))])
        names = np.broadcast_to(campaigns.names, active.shape)[active]
        day = np.searchsorted(self._journey.redemption_day, time // 86400 * 86400)
        return {
            "campaigns": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(names)),
            "coupons": (active & campaigns.covers[product]).sum(axis=1).astype(np.float64),
            "redemptions": self._redeemed.count(household, day.astype(np.int64)),
        }
