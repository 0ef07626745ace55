"""MovieLens in the three spellings of GroupLens, made up, and a sample that carries all columns in one file."""

from pathlib import Path

import pytest

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.recipes.movielens import MovieLens
from thresher.errors import DataError, SchemaError

ALL = {"valid": 0.0, "test": 0.0}
RATINGS = [(1, 10, 5, 100), (1, 11, 3, 300), (1, 12, 4, 200), (2, 10, 1, 50), (2, 12, 4, 60)]


def ml_100k(folder: Path) -> Path:
    flags = ["0"] * 19
    flags[1] = flags[5] = "1"
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
    (folder / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|94043\n")
    (folder / "u.item").write_bytes(
        f"10|Misérables, Les (1995)|01-Jan-1995||http://x|{'|'.join(flags)}\n".encode("latin-1")
        + f"11|Nothing|||http://x|{'|'.join(['0'] * 19)}\n".encode()
    )
    return folder


def ml_1m(folder: Path) -> Path:
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in RATINGS))
    (folder / "users.dat").write_text("1::M::24::12::85711\n2::F::53::14::94043\n")
    (folder / "movies.dat").write_bytes("10::Misérables: Les (1995)::Action|Comedy\n11::X::\n".encode("latin-1"))
    return folder


def ml_25m(folder: Path) -> Path:
    body = "".join(",".join(map(str, row)) + "\n" for row in RATINGS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + body)
    (folder / "movies.csv").write_text('movieId,title,genres\n10,"Misérables, Les",Action|Comedy\n11,"The ""X""",\n')
    return folder


@pytest.mark.parametrize(("make", "first"), [(ml_100k, 1), (ml_1m, 1), (ml_25m, 2)])
def test_every_spelling_gives_the_same_rows(tmp_path, make, first):
    rows = gather(MovieLens(source=make(tmp_path), **ALL))
    assert rows.bad == []
    assert [(row["user_id"], row["item_id"], row["label"], row["time"]) for row in rows.rows()] == [
        (str(user), str(item), int(rating >= 4), time) for user, item, rating, time in RATINGS
    ]
    genres = [row["genres"] or [] for row in rows.rows()]
    assert genres == [["Action", "Comedy"], [], [], ["Action", "Comedy"], []]
    assert [number for _, number in rows.places["train"]] == list(range(first, first + 5))


@pytest.mark.parametrize("make", [ml_100k, ml_1m])
def test_profiles_are_joined(tmp_path, make):
    row = gather(MovieLens(source=make(tmp_path), **ALL)).rows()[0]
    assert (row["age"], row["gender"], row["zip_code"]) == ("24", "M", "85711")


def test_ratings_alone_are_enough(tmp_path):
    ml_100k(tmp_path)
    (tmp_path / "u.user").unlink()
    (tmp_path / "u.item").unlink()
    recipe = MovieLens(source=tmp_path / "u.data", threshold=3, **ALL)
    assert [feature.name for feature in recipe.data_schema().sparse] == ["user_id", "item_id"]
    assert [row["label"] for row in gather(recipe).rows()] == [1, 1, 1, 0, 1]


def test_one_file_that_carries_all_columns():
    recipe = MovieLens(source=shared_dir("tiny_formats") / "deepctr_movielens_sample.txt")
    rows = gather(recipe)
    assert (rows.total, rows.bad) == (200, [])
    assert {"gender", "age", "occupation", "zip_code", "genres"} <= {f.name for f in recipe.data_schema().sparse}


def test_next_items_come_in_order_of_time(tmp_path):
    recipe = MovieLens(source=ml_100k(tmp_path), task="next")
    rows = gather(recipe)
    assert recipe.facts() == {"users_left_out": 0}
    tests = {row["user"]: (row["history"], row["item"], row["time"]) for row in rows.rows("test")}
    assert tests == {"1": (["10", "12"], "11", 300), "2": (["10"], "12", 60)}
    assert [(row["history"], row["item"]) for row in rows.rows("valid")] == [(["10"], "12")]
    assert "train" not in rows.tables
    assert rows.places["test"] == [("u.data", 2), ("u.data", 5)]


def test_the_newest_ratings_are_held_out(tmp_path):
    rows = gather(MovieLens(source=ml_100k(tmp_path), split="time", valid=0.2, test=0.2))
    times = {split: sorted(table.column("time").to_pylist()) for split, table in rows.tables.items()}
    assert times == {"train": [50, 60, 100], "valid": [200], "test": [300]}


def test_malformed_rows_are_set_aside(tmp_path):
    ml_100k(tmp_path)
    (tmp_path / "u.data").write_text(
        "1\t10\t5\t100\n1\t10\tfive\t100\n1\t10\t5\tnoon\n\t10\t5\t100\n1\t10\n1\t10\tnan\t1\n"
    )
    (tmp_path / "u.user").write_text("1|24|M|technician|85711\n2|53\n")
    rows = gather(MovieLens(source=tmp_path, **ALL))
    assert rows.total == 1
    assert [(Path(row.file).name, row.row) for row in rows.bad] == [("u.data", n) for n in (2, 3, 4, 5, 6)] + [
        ("u.user", 2)
    ]
    assert rows.bad[0].reason == "column 'rating': 'five' is no number"


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movie,rating,timestamp\n1,2,3,4\n")
    with pytest.raises(SchemaError, match=r"no column 'item_id'"):
        gather(MovieLens(source=tmp_path))


def test_a_folder_without_ratings_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file of ratings \(u.data, ratings.dat, ratings.csv"):
        gather(MovieLens(source=tmp_path))
