"""Avazu with 24 and with 21 columns."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.recipes.avazu import Avazu
from thresher.errors import ConfigError, DataError, SchemaError

HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,"
    "device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)
ALL = {"valid": 0.0, "test": 0.0}


def line(click="0", hour="14102113") -> str:
    return ",".join(["1", click, hour, *(f"v{i}" for i in range(21))])


def write(folder: Path, *lines: str, name: str = "x.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [("head9k_train.csv", 8_087, 2), ("head9k_dev.csv", 480, 1), ("head9k_test.csv", 432, 1)],
)
def test_24_columns_with_and_without_a_header(name, count, first):
    recipe = Avazu(source=shared_dir("avazu") / name, **ALL)
    rows = gather(recipe)
    assert (rows.total, rows.bad) == (count, [])
    assert rows.places["train"][0] == (name, first)
    assert len(recipe.data_schema().sparse) == 23


def test_21_columns_take_their_clicks_from_another_file():
    folder = shared_dir("avazu")
    recipe = Avazu(source=folder / "X_test_xsmall.csv", clicks=folder / "y_test_xsmall.csv", **ALL)
    rows = gather(recipe)
    assert (rows.total, rows.bad) == (15_000, [])
    assert rows.mean("click") == pytest.approx(0.1706, abs=1e-9)
    assert "device_ip" not in rows.tables["train"].column_names
    assert recipe.data_schema().time is None
    assert set(rows.tables["train"].column("hour_of_day").to_pylist()) == set(range(24))


def test_the_hour_becomes_a_moment(tmp_path):
    (row,) = gather(Avazu(source=write(tmp_path, HEADER, line(hour="14102113")), **ALL)).rows()
    assert (row["hour_of_day"], row["weekday"], row["time"]) == (13, 1, 1413896400)  # a Tuesday


def test_malformed_lines_are_set_aside(tmp_path):
    path = write(tmp_path, HEADER, line(), line(hour="14102199"), line(click="yes"), "1,2", line(hour=""), line())
    rows = gather(Avazu(source=path, **ALL))
    assert [row.row for row in rows.bad] == [3, 4, 5, 6]
    assert rows.bad[0].reason == "column 'hour': '14102199' is no YYMMDDHH"
    assert rows.bad[3].reason == "column 'hour': the value is missing"


def test_hours_without_a_date_are_checked(tmp_path):
    names = HEADER.split(",", 2)[2].replace("device_ip,", "")
    body = [",".join([hour, *["x"] * 20]) for hour in ("02", "24", "7")]
    clicks = write(tmp_path, "click", "0", "0", "1", name="y.csv")
    rows = gather(Avazu(source=write(tmp_path, names, *body), clicks=clicks, **ALL))
    assert [row["hour_of_day"] for row in rows.rows()] == [2, 7]
    assert [row["click"] for row in rows.rows()] == ["0", "1"]
    assert [row.reason for row in rows.bad] == ["column 'hour': '24' is no hour of the day"]


def test_the_newest_rows_are_held_out(tmp_path):
    lines = [line(hour=f"141021{hour:02d}") for hour in reversed(range(20))]
    rows = gather(Avazu(source=write(tmp_path, HEADER, *lines), split="time", valid=0.1, test=0.2))
    hours = {split: sorted(table.column("hour_of_day").to_pylist()) for split, table in rows.tables.items()}
    assert hours == {"train": list(range(14)), "valid": [14, 15], "test": [16, 17, 18, 19]}


def test_rows_of_one_time_cannot_be_split_by_time(tmp_path):
    with pytest.raises(DataError, match="cannot be split by time: most share the time 1413896400"):
        gather(Avazu(source=write(tmp_path, HEADER, line(), line()), split="time"))


def test_files_without_dates_cannot_be_split_by_time():
    folder = shared_dir("avazu")
    recipe = Avazu(source=folder / "X_test_xsmall.csv", clicks=folder / "y_test_xsmall.csv", split="time")
    with pytest.raises(ConfigError, match="the files give hours, no dates"):
        gather(recipe)


def test_missing_clicks_are_asked_for():
    with pytest.raises(SchemaError, match=r"no column 'click'. Give their file: clicks=PATH"):
        gather(Avazu(source=shared_dir("avazu") / "X_test_xsmall.csv"))


def test_clicks_of_other_rows_are_refused(tmp_path):
    clicks = write(tmp_path, "click", *["0"] * 10, name="y.csv")
    with pytest.raises(DataError, match=r"ends at line 11, but .*X_test_xsmall.csv at line 15001"):
        gather(Avazu(source=shared_dir("avazu") / "X_test_xsmall.csv", clicks=clicks))


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(SchemaError, match=r"no column 'C21'. Did you mean"):
        gather(Avazu(source=write(tmp_path, HEADER.replace("C21", "C22"), line())))


def test_clicks_come_in_pairs_with_sources():
    with pytest.raises(ValidationError, match="1 files of clicks for 2 of source"):
        Avazu(source=("a", "b"), clicks="c")
