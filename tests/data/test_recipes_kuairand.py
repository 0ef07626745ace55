"""KuaiRand: the processed sample, and made-up files under the published names and columns."""

from pathlib import Path

import pytest

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.recipes.kuairand import KuaiRand
from thresher.errors import DataError, SchemaError

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)


def line(user=1, video=1, time_ms="1649581149287", click="1") -> str:
    return f"{user},{video},20220410,1700,{time_ms},{click},0,0,0,0,0,1,46186,45916,0,7639,0,0,1"


def published(folder: Path, *log: str) -> Path:
    (folder / "log_standard_4_08_to_4_21_1k.csv").write_text("\n".join([LOG, *log]) + "\n")
    (folder / "log_random_4_22_to_5_08_1k.csv").write_text("\n".join([LOG, line()]) + "\n")
    (folder / "user_features_1k.csv").write_text("user_id,user_active_degree,onehot_feat0,other\n1,full_active,3,x\n")
    (folder / "video_features_basic_1k.csv").write_text("video_id,author_id,tag\n1,77,5\nbad\n2,78,6\n")
    return folder


def test_the_sample_has_its_published_counts():
    rows = gather(KuaiRand(source=shared_dir("kuairand_1k_core15")))
    assert (rows.total, rows.bad) == (41_828, [])
    assert (rows.counts()["valid"], rows.counts()["test"]) == (4_183, 4_183)
    assert rows.mean("is_click") == pytest.approx(0.6570, abs=0.0001)
    assert rows.mean("long_view") == pytest.approx(0.4619, abs=0.0001)
    times = {split: table.column("time").to_pylist() for split, table in rows.tables.items()}
    assert max(times["train"]) <= min(times["valid"])
    assert max(times["valid"]) <= min(times["test"])


def test_several_labels_and_nothing_known_only_later():
    schema = KuaiRand(source=shared_dir("kuairand_1k_core15"), labels=("is_click", "is_comment")).data_schema()
    assert [label.name for label in schema.labels] == ["is_click", "is_comment"]
    features = {f.name for f in (*schema.sparse, *schema.dense)}
    assert features == {"user_id", "video_id", "hour_of_day", "weekday", "duration_ms"}


def test_side_files_are_joined_where_present(tmp_path):
    recipe = KuaiRand(source=published(tmp_path, line(), line(user=2, video=2)), split="random", valid=0.0, test=0.0)
    rows = gather(recipe)
    names = {f.name for f in recipe.data_schema().sparse}
    assert {"tab", "user_active_degree", "onehot_feat0", "author_id"} <= names
    assert "other" not in names
    assert [(row["user_active_degree"], row["author_id"]) for row in rows.rows()] == [
        ("full_active", "77"),
        (None, "78"),
    ]
    assert [(Path(row.file).name, row.row) for row in rows.bad] == [("video_features_basic_1k.csv", 3)]
    assert [path.name for path in recipe.inputs()] == [
        "log_standard_4_08_to_4_21_1k.csv",
        "user_features_1k.csv",
        "video_features_basic_1k.csv",
    ]


def test_the_random_exposure_log_is_asked_for_by_pattern(tmp_path):
    rows = gather(KuaiRand(source=published(tmp_path, line(), line()), pattern="log_*", split="random"))
    assert rows.total == 3


def test_moments_in_utc(tmp_path):
    (row,) = gather(KuaiRand(source=published(tmp_path, line()), split="random", valid=0.0, test=0.0)).rows()
    assert (row["time"], row["hour_of_day"], row["weekday"]) == (1649581149, 8, 6)  # Sunday, 10 April 2022, 08:59


def test_malformed_rows_are_set_aside(tmp_path):
    log = [line(), line(time_ms="soon"), line(click="x"), line(user=""), "1,2", line(time_ms="")]
    rows = gather(KuaiRand(source=published(tmp_path, *log), split="random", valid=0.0, test=0.0))
    bad = {row.row: row.reason for row in rows.bad if "log_" in row.file}
    assert sorted(bad) == [3, 4, 5, 6, 7]
    assert bad[3] == "column 'time_ms': 'soon' is no 64-bit integer"
    assert bad[5] == "column 'user_id': the value is missing"


def test_an_unknown_label_is_named_with_the_nearest():
    with pytest.raises(SchemaError, match=r"no column 'is_clik'. Did you mean 'is_click'"):
        gather(KuaiRand(source=shared_dir("kuairand_1k_core15"), labels="is_clik"))


def test_an_id_that_stands_twice_in_a_side_file_is_refused(tmp_path):
    folder = published(tmp_path, line())
    (folder / "user_features_1k.csv").write_text("user_id,user_active_degree\n1,a\n1,b\n")
    with pytest.raises(DataError, match="user_id '1' stands twice"):
        gather(KuaiRand(source=folder))
