"""Schemas and prepared data sets that are not usable."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.bad_input import shop
from tests.bad_input.case import Case
from tests.bad_input.shop import SCHEMA, Columns, make, part_of, read, with_manifest, with_rows
from thresher.data.dataset import Dataset
from thresher.data.schema import Schema
from thresher.data.writer import DatasetWriter
from thresher.errors import BadBatch, ConfigError, DataError, SchemaError, ThresherError
from thresher.settings import parse


def _schema(id: str, change: Callable[[dict[str, Any]], object], *told: str) -> Case:
    def act(_: Path) -> object:
        values = deepcopy(SCHEMA)
        change(values)
        return parse(Schema, values, "schema")

    return Case(id, act, ConfigError, told)


def _feature(position: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda schema: schema["features"][position].update(changes)


def _add_feature(**feature: Any) -> Callable[[dict[str, Any]], object]:
    return lambda schema: schema["features"].append(feature)


SCHEMAS = (
    _schema("unknown table", _feature(1, table="item"), "feature 'item' uses the unknown table 'item'", "'items'"),
    _schema("duplicate feature", _feature(1, name="user"), "feature 'user' is declared twice"),
    _schema("two labels of one name", _add_feature(kind="label", name="bought"), "feature 'bought' is declared twice"),
    _schema("duplicate table", lambda s: s["tables"].append(s["tables"][0]), "table 'users' is declared twice"),
    _schema("name with a blank", _feature(0, name="user id"), "features[0].name: 'user id' does not fit the pattern"),
    _schema("table without rows", lambda s: s["tables"][0].update(rows=0), "tables[0].rows: must be at least 1, got 0"),
    _schema(
        "unknown kind of feature", _feature(0, kind="sprase"), "features[0].kind: 'sprase' is not known", "'sparse'"
    ),
    _schema("unknown key of a feature", _feature(0, tabel="x"), "features[0].tabel: unknown key", "'table'"),
    _schema("feature without a kind", lambda s: s["features"][0].pop("kind"), "features[0].kind: required", "sparse"),
    _schema("two weights", _add_feature(kind="weight", name="more"), "at most one feature of kind 'weight'"),
    _schema("no features", lambda s: s.pop("features"), "features: required key is absent"),
    _schema("sequence of no length", _feature(2, max_length=0), "features[2].max_length: must be at least 1"),
    _schema("unknown kind of ids", lambda s: s["tables"][0].update(ids="hashed"), "tables[0].ids: 'hashed'", "'hash'"),
)


def _damaged(id: str, damage: Callable[[Path], object], error: type[ThresherError], *told: str) -> Case:
    def act(folder: Path) -> object:
        make(folder / "shop")
        damage(folder / "shop")
        return read(folder / "shop")

    return Case(id, act, error, told)


def _manifest(id: str, change: Callable[[dict[str, Any]], object], *told: str) -> Case:
    return _damaged(id, lambda folder: with_manifest(folder, change), DataError, *told)


def _rename_part(folder: Path) -> object:
    part = part_of(folder)
    part.unlink()
    return part.symlink_to(folder / "nowhere")


def _swap_byte(folder: Path) -> object:
    part = part_of(folder)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    return Dataset.open(folder).verify()


def _write_file(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


PREPARE = "Run 'thresher data prepare' again"
FOLDERS = (
    Case(
        "missing data set", lambda folder: read(folder / "nowhere"), DataError, ("nowhere: no such folder", "prepare")
    ),
    Case("folder that is no data set", read, DataError, ("holds no dataset.json", PREPARE)),
    _damaged("file for a data set", lambda f: read(f / "dataset.json"), DataError, "dataset.json: no such folder"),
    _damaged("manifest that is no JSON", _write_file("dataset.json", "{"), DataError, "is no JSON", PREPARE),
    _damaged("manifest that holds a list", _write_file("dataset.json", "[1]"), DataError, "has format None"),
    _manifest("newer format", lambda m: m.update(format=9), "has format 9, this version reads 1", PREPARE),
    _manifest("manifest without splits", lambda m: m.pop("splits"), "splits: required key is absent", PREPARE),
    _manifest("manifest with a bad schema", lambda m: m["schema"].pop("name"), "schema.name: required key is absent"),
    _manifest("rows that do not add up", lambda m: m["splits"]["train"][0].update(rows=9), "the manifest gives 9 rows"),
    _damaged("truncated file", lambda f: part_of(f).write_bytes(b"PAR1"), DataError, "has 4 bytes, the manifest says"),
    _damaged("empty file of rows", lambda f: part_of(f).write_bytes(b""), DataError, "has 0 bytes, the manifest says"),
    _damaged("missing file of rows", lambda f: part_of(f).unlink(), DataError, "cannot be read: No such file", PREPARE),
    _damaged("unreadable file of rows", _rename_part, DataError, "part-00000.parquet: cannot be read", PREPARE),
    _damaged("changed byte", _swap_byte, DataError, "the bytes changed since they were written", PREPARE),
    _damaged("missing split", lambda f: read(f, "validation"), DataError, "no split 'validation'", "'valid'"),
    _damaged(
        "empty split",
        lambda f: read(with_manifest(f, lambda m: m["splits"].update(valid=[])), "valid"),
        DataError,
        "split 'valid' has no rows",
    ),
)


def _rows(id: str, change: Callable[[Columns], Columns], error: type[ThresherError], *told: str) -> Case:
    def act(folder: Path) -> object:
        return read(with_rows(change)(folder / "shop"))

    return Case(id, act, error, told)


def _set(name: str, value: object, row: int = 3) -> Callable[[Columns], Columns]:
    def change(columns: Columns) -> Columns:
        values = list(columns[name])
        values[row] = value
        return columns | {name: values}

    return change


def _without(name: str) -> Callable[[Columns], Columns]:
    return lambda columns: {key: values for key, values in columns.items() if key != name}


def _falling_offsets(folder: Path) -> object:
    offsets = np.arange(shop.ROWS + 1, dtype=np.int32)
    offsets[3:5] = [4, 3]
    lists = pa.ListArray.from_buffers(
        pa.list_(pa.int64()),
        shop.ROWS,
        [None, pa.py_buffer(offsets)],
        children=[pa.array(np.zeros(shop.ROWS, np.int64))],
    )
    writer = DatasetWriter(folder, Schema.model_validate(SCHEMA), "shop", {})
    return writer.write("train", pa.table(shop.columns() | {"history": lists}))


AT = "row 3"
ROWS = (
    _rows("missing column", _without("price"), SchemaError, "no column 'price'", "part-00000.parquet"),
    _rows(
        "column of another type",
        lambda columns: columns | {"price": ["cheap"] * shop.ROWS},
        SchemaError,
        "column 'price' has type string, expected float",
        "Prepare the data again",
    ),
    _rows(
        "ids that are fractions",
        lambda columns: columns | {"user": [0.5] * shop.ROWS},
        SchemaError,
        "column 'user' has type double, expected int32",
    ),
    _rows(
        "single ids for lists",
        lambda columns: columns | {"history": [1] * shop.ROWS},
        SchemaError,
        "column 'history' has type int64, expected list",
    ),
    _rows("id out of range", _set("user", 50), BadBatch, "feature 'user' of table 'users': id 50", AT, "outside 0..49"),
    _rows("negative id", _set("item", -1), BadBatch, "feature 'item' of table 'items': id -1", AT, "outside 0..99"),
    _rows("id out of range in a list", _set("history", [1, 100]), BadBatch, "feature 'history'", "id 100", AT),
    _rows("null id", _set("user", None), BadBatch, "feature 'user'", "null", AT),
    _rows("null list", _set("history", None), BadBatch, "feature 'history'", "null", AT),
    _rows("list too long", _set("history", [1] * 6), BadBatch, "6 elements", AT, "more than max_length 5"),
    _rows("NaN in a dense feature", _set("price", float("nan")), BadBatch, "feature 'price': nan", AT, "is not finite"),
    _rows("infinite dense feature", _set("price", float("inf")), BadBatch, "feature 'price': inf", AT),
    _rows("two for a binary label", _set("bought", 2.0), BadBatch, "feature 'bought': 2.0", AT, "neither 0 nor 1"),
    _rows("NaN for a label", _set("bought", float("nan")), BadBatch, "feature 'bought': nan", AT),
    _rows("negative weight", _set("importance", -1.0), BadBatch, "feature 'importance': -1.0", AT, "at least 0"),
    Case(
        "falling list offsets",
        _falling_offsets,
        SchemaError,
        ("feature 'history' of table 'items'", "the list offsets decrease at row 3"),
    ),
)

CASES = (*SCHEMAS, *FOLDERS, *ROWS)
