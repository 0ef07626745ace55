"""The prepared data set on disk: what is written, and every way in which opening it fails."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import made
from thresher.data import writer as writer_module
from thresher.data.dataset import MANIFEST, Dataset
from thresher.data.schema import RAW_IDS, Schema
from thresher.data.writer import GROUP_ROWS, DatasetWriter
from thresher.errors import DataError, SchemaError


@pytest.fixture
def folder(tmp_path):
    made.make(tmp_path / "d", made.SCHEMA, train=300, valid=20)
    return tmp_path / "d"


def test_what_was_written_is_read(folder):
    data = Dataset.open(folder)
    assert data.schema == made.SCHEMA
    assert data.manifest.recipe == "made"
    assert data.manifest.options == {"splits": {"train": 300, "valid": 20}}
    assert data.manifest.facts == {"made": True}
    assert {name: data.split(name).rows for name in data.manifest.splits} == {"train": 300, "valid": 20}
    table = pa.concat_tables([pq.read_table(path) for path in data.split("train").paths])
    assert table.to_pydict() == made.rows_of(made.SCHEMA, 300)
    data.verify()


def test_types_on_disk(folder):
    found = pq.read_schema(Dataset.open(folder).split("train").paths[0])
    kinds = {name: str(found.field(name).type) for name in found.names}
    assert kinds["user_id"] == "int32"
    assert kinds["history"] == "list<element: int32 not null>"
    assert kinds["history.age"] == kinds["liked.weights"] == "list<element: float not null>"
    assert kinds["price"] == kinds["bought"] == kinds["importance"] == "float"
    assert kinds["when"] == kinds["session"] == "int64"
    assert not any(found.field(name).nullable for name in found.names)


def test_row_groups_and_files_are_of_fixed_size(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "FILE_GROUPS", 2)
    writer = DatasetWriter(tmp_path / "d", made.FLAT, "r", {})
    rows, sizes = made.rows_of(made.FLAT, 3 * GROUP_ROWS + 5), [1, GROUP_ROWS, 7, 2 * GROUP_ROWS - 3]
    for start, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        writer.write("train", pa.table({name: values[start : start + size] for name, values in rows.items()}))
    split = writer.finish({}).split("train")
    assert [part.groups for part in split.parts] == [(GROUP_ROWS, GROUP_ROWS), (GROUP_ROWS, 5)]
    assert [path.name for path in split.paths] == ["part-00000.parquet", "part-00001.parquet"]
    assert pa.concat_tables([pq.read_table(path) for path in split.paths]).to_pydict() == rows


def test_files_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "FILE_BYTES", 1)
    data = made.make(tmp_path / "d", made.FLAT, train=2 * GROUP_ROWS)
    assert [part.rows for part in data.split("train").parts] == [GROUP_ROWS, GROUP_ROWS]


def test_fingerprints(tmp_path):
    one, same = (made.make(tmp_path / name, made.FLAT, train=100, valid=100) for name in "ab")
    assert one.fingerprint("train") == same.fingerprint("train")
    assert one.fingerprint("train") != one.fingerprint("valid")
    assert one.fingerprint("train") != made.make(tmp_path / "c", made.FLAT, train=101).fingerprint("train")


def test_an_unknown_split_names_the_nearest(folder):
    with pytest.raises(DataError, match=r"no split 'vali'. Did you mean 'valid'\? Allowed: train, valid"):
        Dataset.open(folder).split("vali")


def spoil(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def part_of(folder: Path) -> Path:
    return folder / "train" / "part-00000.parquet"


FAULTS = {
    "no such folder": (lambda d: d.rename(d.with_name("e")), r"/d: no such folder. Run 'thresher data prepare"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "holds no dataset.json: .* did not finish. Run"),
    "no JSON": (lambda d: (d / MANIFEST).write_text("{"), "dataset.json: is no JSON"),
    "no mapping": (lambda d: (d / MANIFEST).write_text("[]"), "has format None, this version reads 1"),
    "other format": (lambda d: spoil(d, format=2), "dataset.json: has format 2, this version reads 1"),
    "unknown key": (lambda d: spoil(d, color=1), "dataset.json.* color: unknown key"),
    "no recipe": (lambda d: spoil(d, recipe=None), "dataset.json.* recipe: "),
    "no file": (lambda d: part_of(d).unlink(), "part-00000.parquet: cannot be read: No such file"),
    "truncated": (lambda d: part_of(d).write_bytes(b"PAR1"), "part-00000.parquet: has 4 bytes, the manifest says"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_opening_what_is_broken(folder, name):
    harm, message = FAULTS[name]
    harm(folder)
    with pytest.raises(DataError, match=message):
        Dataset.open(folder)


def test_rows_that_do_not_add_up(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"][0]["rows"] = 301
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the manifest gives 301 rows, but its row groups sum to 300"):
        Dataset.open(folder)


def test_verify_finds_a_flipped_bit(folder):
    data = Dataset.open(folder)
    content = bytearray(part_of(folder).read_bytes())
    content[100] ^= 1
    part_of(folder).write_bytes(content)
    with pytest.raises(DataError, match=r"train/part-00000.parquet: the bytes changed"):
        data.verify()


def test_an_existing_data_set_is_not_overwritten(folder):
    with pytest.raises(DataError, match="already holds a data set"):
        DatasetWriter(folder, made.FLAT, "r", {})


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"holds another file, thesis.tex. Give an empty folder"):
        DatasetWriter(tmp_path, made.FLAT, "r", {})


def test_left_overs_of_an_unfinished_preparation_are_replaced(tmp_path):
    writer = DatasetWriter(tmp_path, made.FLAT, "r", {})
    writer.write("train", pa.table(made.rows_of(made.FLAT, GROUP_ROWS)))
    with pytest.raises(DataError, match="did not finish"):
        Dataset.open(tmp_path)
    del writer
    assert made.make(tmp_path, made.FLAT, valid=5).manifest.splits.keys() == {"valid"}
    assert not list(tmp_path.glob("train/*.parquet"))


def test_nothing_written(tmp_path):
    with pytest.raises(DataError, match="no row was written"):
        DatasetWriter(tmp_path, made.FLAT, "r", {}).finish({})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*Check space and rights"):
        DatasetWriter(tmp_path / "file" / "d", made.FLAT, "r", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, r"no column 'user_id'. Allowed: bought, friend_id, price"),
        ({"users": [1] * 9}, "column 'users' is not in the schema. Did you mean 'user_id'"),
        ({"user_id": ["a"] * 9}, "column 'user_id' has type string, expected int32"),
        ({"user_id": [*range(8), None]}, "column 'user_id' holds 1 nulls"),
        ({"user_id": [*range(8), 100]}, "feature 'user_id' of table 'users': id 100 is outside 0..99"),
        ({"user_id": [*range(8), -1]}, "feature 'user_id' of table 'users': id -1 is outside 0..99"),
    ],
)
def test_rows_that_do_not_follow_the_schema(tmp_path, change, message):
    columns = {**made.rows_of(made.FLAT, 9), **change}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    with pytest.raises(SchemaError, match=message):
        DatasetWriter(tmp_path / "d", made.FLAT, "r", {}).write("train", table)


def test_raw_ids_may_exceed_the_rows_of_their_table(tmp_path):
    shown = [{"kind": "sparse", "name": "word", "table": "words"}]
    schema = Schema.model_validate(
        {"name": "d", "tables": [{"name": "words", "rows": 5, "ids": "raw"}], "features": shown}
    )
    writer = DatasetWriter(tmp_path / "d", schema, "made", {})
    writer.write("train", pa.table({"word": [3, 1 << 40, RAW_IDS - 1]}))
    table = pq.read_table(writer.finish({}).split("train").paths[0])
    assert table["word"].to_pylist() == [3, 1 << 40, RAW_IDS - 1]
    with pytest.raises(SchemaError, match="id 4611686018427387904 is outside"):
        DatasetWriter(tmp_path / "e", schema, "made", {}).write("train", pa.table({"word": [RAW_IDS]}))
