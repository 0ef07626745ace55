"""Criteo in all its spellings."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.encode import Encoder
from thresher.data.recipes.criteo import CATEGORIES, INTEGERS, Criteo, bucket
from thresher.errors import DataError, SchemaError


def line(label="0", integer="1", category="68fd1e64", delimiter="\t") -> str:
    return delimiter.join([label, *[integer] * 13, *[category] * 26])


def write(folder: Path, *lines: str, name: str = "train.txt") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def encoded(recipe: Criteo) -> pa.Table:
    encoder = Encoder(recipe.data_schema())
    return pa.concat_tables([encoder.encode(chunk.table)[0] for chunk in recipe.chunks()])


def test_the_kaggle_sample_has_its_published_counts():
    rows = gather(Criteo(source=shared_dir("criteo_kaggle"), valid=0.0, test=0.2))
    assert rows.total == 24_433
    assert round(rows.mean("label"), 3) == 0.22
    assert rows.bad == []
    assert abs(rows.counts()["test"] / rows.total - 0.2) < 0.01
    whole = pa.concat_tables(rows.tables.values())
    assert sum(len(whole.column(name).drop_null().unique()) for name in CATEGORIES) == 86_404


@pytest.mark.parametrize(
    ("data", "name", "count"),
    [
        ("criteo_kaggle", "random10k_float.txt", 10_000),
        ("criteo_kaggle", "x4_valid_sample.csv", 3_999),
        ("criteo_kaggle", "x4_test_sample.csv", 3_999),
        ("criteo_kaggle", "head8k_train.tsv", 7_200),
        ("criteo_kaggle", "head8k_dev.tsv", 409),
        ("criteo_kaggle", "head8k_test.tsv", 391),
        ("criteo_1tb", "day_11_first_3k_rows_original.tsv", 3_000),
        ("criteo_1tb", "hillview_1k.tsv", 1_000),
    ],
)
def test_other_spellings_lose_no_row(data, name, count):
    rows = gather(Criteo(source=shared_dir(data) / name))
    assert (rows.total, rows.bad) == (count, [])


def test_integers_written_as_floats_encode_alike():
    folder = shared_dir("criteo_kaggle")
    options = {"valid": 0.0, "test": 0.0, "buckets": True}
    floats = encoded(Criteo(source=folder / "random10k_float.txt", **options))
    plain = encoded(Criteo(source=folder / "train.txt", **options)).slice(0, 10_000)
    assert floats.equals(plain)


def test_logistic_regression_reaches_the_claimed_auc():
    """Default options, random 80/20: above 0.755 (measured 0.761 to 0.769 over seeds 0 to 3)."""
    recipe = Criteo(source=shared_dir("criteo_kaggle"), valid=0.0, test=0.2)
    schema, encoder = recipe.data_schema(), Encoder(recipe.data_schema())
    pieces = {split: [] for split in ("train", "test")}
    for chunk in recipe.chunks():
        pieces[chunk.split].append(encoder.encode(chunk.table)[0])
    matrices = {}
    for split, tables in pieces.items():
        table = pa.concat_tables(tables)
        dense = np.stack([table.column(name).to_numpy() for name in INTEGERS], axis=1)
        ids = [table.column(name).to_numpy() + i * schema.table(name).rows for i, name in enumerate(CATEGORIES)]
        n, k, width = table.num_rows, len(ids), len(ids) * 100_000
        place = (np.repeat(np.arange(n), k), np.stack(ids, axis=1).ravel())
        onehot = sparse.csr_matrix((np.ones(n * k, np.float32), place), shape=(n, width))
        matrices[split] = sparse.hstack([sparse.csr_matrix(dense), onehot]).tocsr(), table.column("label").to_numpy()
    (x, y), (x_test, y_test) = matrices["train"], matrices["test"]
    used = np.flatnonzero(np.asarray(x.sum(axis=0)).ravel())
    model = LogisticRegression(C=0.03, solver="liblinear", tol=1e-3).fit(x[:, used], y)
    assert roc_auc_score(y_test, model.decision_function(x_test[:, used])) >= 0.755


def test_the_split_does_not_depend_on_what_else_the_file_holds(tmp_path):
    lines = [line(category=f"{i:08x}") for i in range(400)]
    whole = gather(Criteo(source=write(tmp_path, *lines)))
    lines[7] = "torn"
    damaged = gather(Criteo(source=write(tmp_path, *lines)))
    for split, places in whole.places.items():
        assert damaged.places[split] == [place for place in places if place[1] != 8]
    assert gather(Criteo(source=write(tmp_path, *lines), seed=1)).places != damaged.places


def test_a_share_of_zero_gets_no_row(tmp_path):
    path = write(tmp_path, *[line()] * 200)
    assert set(gather(Criteo(source=path, valid=0.0, test=0.3)).counts()) == {"train", "test"}
    assert gather(Criteo(source=path, valid=0.0, test=0.0)).counts() == {"train": 200}


def test_the_last_file_is_held_out(tmp_path):
    for day in (0, 2, 10):
        write(tmp_path, *[line(integer=str(day))] * 50, name=f"day_{day}")
    rows = gather(Criteo(source=tmp_path, split="last_file"))
    assert set(rows.tables["train"].column("I1").to_pylist()) == {"0", "2"}
    assert rows.counts()["train"] == 100
    assert rows.counts()["valid"] + rows.counts()["test"] == 50
    assert gather(Criteo(source=tmp_path, split="last_file", valid=0.0)).counts() == {"train": 100, "test": 50}


def test_compressed_days_are_read(tmp_path):
    (tmp_path / "day_0.gz").write_bytes(gzip.compress((line() + "\n").encode()))
    assert gather(Criteo(source=tmp_path)).total == 1


def test_missing_values_are_nulls(tmp_path):
    path = write(tmp_path, line(integer="", category=""))
    (row,) = gather(Criteo(source=path, valid=0.0, test=0.0, buckets=True)).rows()
    assert row["I1"] is row["C26"] is row["I13_bucket"] is None
    table = encoded(Criteo(source=path, valid=0.0, test=0.0))
    assert (table.column("I1").to_pylist(), table.column("C1").to_pylist()) == ([0.0], [0])


def test_malformed_lines_are_set_aside(tmp_path):
    bad_label, bad_integer, short = line(label="2"), line(integer="x"), "0\t1\t2"
    path = write(tmp_path, line(), bad_label, short, bad_integer, line(label=""), line())
    rows = gather(Criteo(source=path, valid=0.0, test=0.0, buckets=True))
    assert [(row.file, row.row) for row in rows.bad] == [(str(path), n) for n in (2, 3, 4, 5)]
    assert [row.reason.split(":")[0] for row in rows.bad] == [
        "feature 'label'",
        "line",
        "feature 'I1'",
        "feature 'label'",
    ]


def test_buckets_follow_the_winners_rule():
    raw = pa.array(["-2", "0", "2", "3", "2.0", "100", "1e3", "x", None])
    assert bucket(raw).to_pylist() == [-2, 0, 2, 4, 2, 24, None, None, None]
    assert bucket(raw.slice(0, 6)).to_pylist() == [-2, 0, 2, 4, 2, 24]


def test_a_file_without_labels_is_refused(tmp_path):
    path = write(tmp_path, line().split("\t", 1)[1], name="test.txt")
    with pytest.raises(SchemaError, match="has 39 columns, no column 'label'"):
        gather(Criteo(source=path))


def test_a_header_that_lacks_a_column_is_refused(tmp_path):
    names = ",".join(["Label", *INTEGERS, *CATEGORIES]).replace("I13", "I_13")
    path = write(tmp_path, names, line(delimiter=","), name="x.csv")
    with pytest.raises(SchemaError, match=r"no column 'I13'. Did you mean"):
        gather(Criteo(source=path))


def test_a_file_of_another_format_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"1 columns parted by a tab, expected 40"):
        gather(Criteo(source=write(tmp_path, "hello world")))


def test_a_folder_without_known_names_is_refused(tmp_path):
    write(tmp_path, line(), name="piece.tsv")
    with pytest.raises(DataError, match="no Criteo file"):
        gather(Criteo(source=tmp_path))


def test_shares_must_leave_rows():
    with pytest.raises(ValidationError, match="leaves no rows to train on"):
        Criteo(source="x", valid=0.5, test=0.5)
