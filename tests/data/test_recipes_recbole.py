"""RecBole's atomic files as click-through rates and as sequences."""

from pathlib import Path

import pytest

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.recipes.recbole import RecBole
from thresher.errors import ConfigError, DataError, SchemaError

ALL = {"valid": 0.0, "test": 0.0}
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ROWS = "1\t10\t5\t100\n1\t11\t3\t300.7\n1\t12\t4\t200\n2\t10\t1\t50\n2\t12\t4\t60\n"


def made(folder: Path, inter: str = INTER + ROWS, item: str = "", user: str = "") -> Path:
    for suffix, text in (("inter", inter), ("item", item), ("user", user)):
        if text:
            (folder / f"x.{suffix}").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "users", "interactions"),
    [
        ("Amazon_Beauty", 22_363, 198_502),
        ("Amazon_Sports_and_Outdoors", 35_598, 296_337),
        ("Amazon_Toys_and_Games", 19_412, 167_597),
    ],
)
def test_real_interactions_become_sequences_in_file_order(name, users, interactions):
    rows = gather(RecBole(source=shared_dir("recbole_inter") / f"{name}.inter"))
    assert rows.bad == []
    assert rows.counts() == {"train": users, "valid": users, "test": users}
    histories = rows.tables["test"].column("history")
    assert sum(len(chunk.flatten()) for chunk in histories.chunks) + users == interactions


def test_ratings_become_labels_with_side_files_joined(tmp_path):
    folder = made(
        tmp_path,
        item="item_id:token\tyear:token\tclass:token_seq\tprice:float\n10\t1990\tA B\t1.5\n11\t1991\t\t\n",
        user="user_id:token\tage:token\n1\t24\n2\t53\n",
    )
    recipe = RecBole(source=folder, **ALL)
    rows = gather(recipe)
    assert [row["label"] for row in rows.rows()] == [1, 0, 1, 0, 1]
    assert [row["time"] for row in rows.rows()] == [100, 300, 200, 50, 60]
    first = rows.rows()[0]
    assert (first["year"], first["class"], first["price"], first["age"]) == ("1990", ["A", "B"], "1.5", "24")
    schema = recipe.data_schema()
    assert {f.name: f.many for f in schema.sparse}["class"]
    assert [f.name for f in schema.dense] == ["price"]
    assert rows.places["train"] == [("x.inter", n) for n in range(2, 7)]


def test_a_label_is_taken_as_it_is(tmp_path):
    folder = made(tmp_path, "user_id:token\titem_id:token\tlabel:float\n1\t2\t1\n1\t3\t0\n1\t4\t2\n")
    rows = gather(RecBole(source=folder, **ALL))
    assert [row["label"] for row in rows.rows()] == ["1", "0", "2"]
    assert [row.reason for row in rows.bad] == ["feature 'label': '2' is not 0 or 1"]


def test_next_items_by_time_with_tokens_of_the_items(tmp_path):
    folder = made(tmp_path, item="item_id:token\tyear:token\n10\t1990\n11\t1991\n12\t1992\n")
    with (folder / "x.inter").open("a") as file:
        file.write("3\t10\t5\t100\n")
    recipe = RecBole(source=folder, task="next")
    rows = gather(recipe)
    assert recipe.facts() == {"users_left_out": 1}
    tests = {row["user"]: row for row in rows.rows("test")}
    assert (tests["1"]["history"], tests["1"]["item"], tests["1"]["time"]) == (["10", "12"], "11", 300)
    assert (tests["1"]["history.year"], tests["1"]["year"]) == (["1990", "1992"], "1991")


def test_the_newest_are_held_out(tmp_path):
    rows = gather(RecBole(source=made(tmp_path), split="time", valid=0.2, test=0.2))
    assert {split: sorted(t.column("time").to_pylist()) for split, t in rows.tables.items()} == {
        "train": [50, 60, 100],
        "valid": [200],
        "test": [300],
    }


def test_malformed_rows_are_set_aside(tmp_path):
    folder = made(tmp_path, INTER + "1\t10\t5\t100\n1\t10\tfive\t100\n1\t10\t5\tnoon\n\t10\t5\t100\n1\t10\n")
    rows = gather(RecBole(source=folder, **ALL))
    assert [row.row for row in rows.bad] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("inter", "options", "message"),
    [
        ("user_id\titem_id:token\n1\t2\n", {}, "column 'user_id' has no type"),
        ("user_id:token\titem_id:tokn\n1\t2\n", {}, r"of no known type. Did you mean 'token'"),
        ("user:token\titem_id:token\n1\t2\n", {}, r"no column 'user_id'. Did you mean 'user'"),
        (INTER + ROWS, {"label": "ratng"}, r"no column 'ratng'. Did you mean 'rating'"),
        ("user_id:token\titem_id:token\n1\t2\n", {"task": "ctr"}, "no column 'label' or 'rating'"),
        (INTER.strip() + "\temb:float_seq\n1\t2\t3\t4\t5 6\n", {}, r"'emb' is a float_seq.*ignore=emb"),
        (INTER.strip() + "\tgroup:token\n1\t2\t3\t4\t5\n", {}, "the name of column 'group' is taken"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, inter, options, message):
    with pytest.raises(SchemaError, match=message):
        gather(RecBole(source=made(tmp_path, inter), **options))


def test_ignored_columns_are_left_out(tmp_path):
    folder = made(tmp_path, INTER.strip() + "\temb:float_seq\n1\t2\t3\t4\t5 6\n")
    assert gather(RecBole(source=folder, ignore="emb", **ALL)).total == 1


def test_no_time_no_time_split(tmp_path):
    folder = made(tmp_path, "user_id:token\titem_id:token\tlabel:float\n1\t2\t1\n")
    with pytest.raises(ConfigError, match="no column 'timestamp'"):
        gather(RecBole(source=folder, split="time"))


def test_a_folder_without_interactions_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file of interactions \(\*\.inter\)"):
        gather(RecBole(source=tmp_path))


def test_several_files_of_interactions_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"several files, Amazon_Beauty.inter and Amazon_Sports"):
        gather(RecBole(source=shared_dir("recbole_inter")))
