"""Batches: what they hold, in which order, on any number of ranks, and how reading ends."""

import gc
import json
import threading
import time
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data import made
from thresher.data.dataset import MANIFEST, Dataset
from thresher.data.order import Order
from thresher.data.reader import Reader
from thresher.errors import BadBatch, ConfigError, DataError, SchemaError

ROWS = 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The made data in row groups of 50 rows: many small groups, two files."""
    target = tmp_path_factory.mktemp("made") / "data"
    made.make(target, made.SCHEMA, train=ROWS)
    return regroup(target, made.rows_of(made.SCHEMA, ROWS), 50, 2)


@pytest.fixture(scope="module")
def dataset(folder):
    return Dataset.open(folder)


def regroup(folder, columns, group_rows, files, schema=None):
    """Replaces the split ``train`` by files that another program wrote."""
    table = pa.table(columns, schema=schema)
    for old in (folder / "train").glob("*"):
        old.unlink()
    parts, cut = [], -(-table.num_rows // files)
    for number in range(files):
        path = folder / "train" / f"part-{number:05d}.parquet"
        part = table.slice(number * cut, cut)
        pq.write_table(part, path, row_group_size=group_rows)
        groups = [min(group_rows, part.num_rows - at) for at in range(0, part.num_rows, group_rows)]
        facts = {"path": f"train/{path.name}", "rows": part.num_rows, "groups": groups, "xxh3_128": ""}
        parts.append(facts | {"size_bytes": path.stat().st_size})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"] = {"train": parts}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def reader(dataset, **options):
    return Reader(dataset, "train", **({"batch_size": 16, "window_rows": 150, "seed": 5} | options))


def check_rows(batch, columns, schema=made.SCHEMA):
    """Every value of a batch is the one of its row."""
    rows = batch.index.tolist()
    for key in schema.id_tables:
        jagged = batch.sparse[key]
        wanted = [columns[key][row] if isinstance(columns[key][row], list) else [columns[key][row]] for row in rows]
        assert [part.tolist() for part in jagged.to_dense()] == wanted
        feature = next((f for f in schema.sparse if f.name == key), None)
        if feature is not None and feature.weights:
            weights = [part.tolist() for part in jagged.to_dense_weights()]
            assert weights == [columns[f"{key}.weights"][row] for row in rows]
        elif batch.sparse.weights_or_none() is not None:
            assert set(jagged.weights().tolist()) <= {1.0}
    for key in schema.float_side_keys:
        assert [part.tolist() for part in batch.side[key].to_dense()] == [columns[key][row] for row in rows]
    for features, tensor in ((schema.dense, batch.dense), (schema.labels, batch.labels)):
        assert tensor.tolist() == [[columns[f.name][row] for f in features] for row in rows]
    for feature, tensor in ((schema.time, batch.time), (schema.group, batch.group)):
        assert tensor.tolist() == ([columns[feature.name][row] for row in rows] if feature else [0] * len(rows))


def test_a_batch_holds_its_rows(dataset):
    columns = made.rows_of(made.SCHEMA, ROWS)
    for batch in islice(reader(dataset).stream(0), 60):
        check_rows(batch, columns)
        assert batch.weight.tolist() == [columns["importance"][row] for row in batch.index.tolist()]
        assert batch.sparse.keys() == list(made.SCHEMA.id_tables)
        assert batch.sparse.values().dtype == torch.int64
        assert batch.dense.dtype == batch.labels.dtype == batch.weight.dtype == torch.float32


def test_features_of_one_id(tmp_path):
    flat = made.make(tmp_path / "d", made.FLAT, train=100)
    for batch in islice(Reader(flat, "train", batch_size=32, window_rows=1000).stream(0), 7):
        check_rows(batch, made.rows_of(made.FLAT, 100), made.FLAT)
        assert batch.weight.tolist() == [1.0] * 32
        assert batch.sparse.lengths().tolist() == [1] * 64
        assert batch.sparse.offsets().tolist() == list(range(65))
        assert batch.sparse.weights_or_none() is None
        assert batch.sparse.offset_per_key() == [0, 32, 64]


@pytest.mark.parametrize("window_rows", [60, 150, 10_000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_stream_follows_the_order(dataset, window_rows, shuffle):
    order = Order([50] * 14, 5, window_rows, shuffle)
    wanted = [(epoch, row) for epoch in range(3) for row in order.rows_at(epoch, np.arange(ROWS)).tolist()]
    batches = islice(reader(dataset, window_rows=window_rows, shuffle=shuffle).stream(0), 3 * ROWS // 16)
    found = [pair for b in batches for pair in zip(b.epoch.tolist(), b.index.tolist(), strict=True)]
    assert found == wanted[: len(found)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("window_rows", [150, 10_000])
def test_any_world_sees_the_same_global_batches(dataset, world, window_rows):
    """From any cursor, with any number of ranks: position p goes to rank p % world."""
    start, size = 533, 12
    whole = [i for b in islice(reader(dataset, window_rows=window_rows).stream(0), 200) for i in b.index.tolist()]
    options = {"batch_size": size, "window_rows": window_rows, "world": world}
    streams = [reader(dataset, rank=rank, **options).stream(start) for rank in range(world)]
    for turn in range(1200 // (size * world)):
        first = start + turn * size * world
        for rank, stream in enumerate(streams):
            wanted = [whole[p] for p in range(first, first + size * world) if p % world == rank]
            assert next(stream).index.tolist() == wanted


def test_prefetching_changes_nothing(dataset):
    inline, ahead = (reader(dataset, prefetch=prefetch).stream(77) for prefetch in (0, 3))
    for one, other in islice(zip(inline, ahead, strict=True), 100):
        assert one.index.tolist() == other.index.tolist()
        assert torch.equal(one.sparse.values(), other.sparse.values())


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("max_rows", [0, 1, 2, 100, 10_000])
def test_a_sweep_meets_each_row_once(dataset, world, max_rows):
    columns = made.rows_of(made.SCHEMA, ROWS)
    found, counts = [], set()
    for rank in range(world):
        batches = list(reader(dataset, rank=rank, world=world).sweep(max_rows))
        counts.add(len(batches))
        for batch in batches:
            assert batch.size == 16
            check_rows(batch, columns)
            found += batch.index[batch.weight > 0].tolist()
    weightless = {row for row, weight in enumerate(columns["importance"]) if weight == 0}
    assert found == [row for row in range(min(max_rows or ROWS, ROWS)) if row not in weightless]
    assert len(counts) == 1


def threads():
    return [t for t in threading.enumerate() if t.name == "thresher-ahead"]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert threads() == []


def test_an_abandoned_iterator_ends_its_threads(dataset):
    stream = reader(dataset).stream(0)
    next(stream)
    assert len(threads()) == 2
    del stream
    wait_for_no_threads()


def test_close_ends_all_threads(dataset):
    one = reader(dataset)
    streams = [one.stream(0), one.stream(5), one.sweep()]
    for stream in streams:
        next(stream)
    one.close()
    wait_for_no_threads()
    assert [list(stream) for stream in streams] == [[], [], []]


def test_a_finished_sweep_leaves_no_thread(dataset):
    sweep = reader(dataset).sweep()
    assert len(list(sweep)) == 44
    wait_for_no_threads()


def test_prefetch_is_bounded(dataset, monkeypatch):
    made_batches = []
    from thresher.data.collate import Collator

    original = Collator.batch
    monkeypatch.setattr(Collator, "batch", lambda *args: made_batches.append(1) or original(*args))
    stream = reader(dataset, prefetch=3).stream(0)
    next(stream)
    time.sleep(0.3)
    assert len(made_batches) <= 4


def test_arguments_are_checked(dataset, tmp_path):
    with pytest.raises(DataError, match=r"no split 'trian'. Did you mean 'train'\?"):
        Reader(dataset, "trian", batch_size=1, window_rows=1)
    with pytest.raises(ConfigError, match=r"rank 2 is outside 0\.\.1"):
        reader(dataset, rank=2, world=2)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        reader(dataset, batch_size=0)
    with pytest.raises(ConfigError, match="window_rows is 0"):
        reader(dataset, window_rows=0)
    with pytest.raises(ConfigError, match=r"max_bad_share is 0.5, but there is no folder"):
        reader(dataset, max_bad_share=0.5)


def changed(tmp_path, schema=None, **cells):
    """The made data with some cells replaced, in one file of row groups of 50: ``column={row: value}``."""
    columns = made.rows_of(made.SCHEMA, 200)
    for name, values in cells.items():
        for row, value in values.items():
            columns[name.replace("__", ".")][row] = value
    made.make(tmp_path / "d", made.SCHEMA, train=200)
    return Dataset.open(regroup(tmp_path / "d", columns, 50, 1, schema))


BAD = [
    ({"user_id": {117: 100}}, "feature 'user_id' of table 'users': id 100 at {} is outside 0..99"),
    ({"user_id": {117: -1}}, "feature 'user_id' of table 'users': id -1 at {} is outside 0..99"),
    ({"user_id": {117: 2**40}}, f"feature 'user_id' of table 'users': id {2**40} at {{}} is outside 0..99"),
    ({"user_id": {117: None}}, "feature 'user_id' of table 'users': null at {}"),
    ({"liked": {117: [5, 1000]}, "liked__weights": {117: [1.0, 1.0]}}, "'liked' of table 'items': id 1000 at {}"),
    ({"liked": {117: [5, None]}, "liked__weights": {117: [1.0, 1.0]}}, "'liked' of table 'items': null at {}"),
    ({"liked": {117: None}}, "feature 'liked' of table 'items': null at {}"),
    ({"liked": {117: [1]}, "liked__weights": {117: [1.0, 2.0]}}, "2 elements at {}, but 'liked' has 1"),
    ({"liked": {117: [1]}, "liked__weights": {117: [float("nan")]}}, "'liked.weights': nan at {} is not finite"),
    ({"history": {117: [1]}, "history__user": {117: []}}, "0 elements at {}, but 'history' has 1"),
    ({"history": {117: [1] * 6}}, "6 elements at {} are more than max_length 5"),
    ({"history__user": {117: [1]}, "history": {117: [1]}, "history__age": {117: [1.0, 2.0]}}, "'history.age': 2 el"),
    ({"price": {117: float("inf")}}, "feature 'price': inf at {} is not finite"),
    ({"price": {117: 1e300}}, "feature 'price': inf at {} is not finite"),
    ({"bought": {117: float("nan")}}, "feature 'bought': nan at {} is neither 0 nor 1"),
    ({"bought": {117: 0.5}}, "feature 'bought': 0.5 at {} is neither 0 nor 1"),
    ({"importance": {117: -0.5}}, "feature 'importance': -0.5 at {} is not finite and at least 0"),
    ({"when": {117: None}}, "feature 'when': null at {}"),
]


@pytest.mark.parametrize(("cells", "message"), BAD)
def test_a_bad_row_is_named(tmp_path, cells, message):
    stream = reader(changed(tmp_path, **cells), prefetch=0).stream(0)
    with pytest.raises(BadBatch) as caught:
        list(islice(stream, 20))
    assert message.format("row 117 of split 'train'") in str(caught.value)
    assert "(file part-00000.parquet, row 117)" in str(caught.value)


def test_the_thread_hands_errors_to_the_consumer(tmp_path):
    stream = reader(changed(tmp_path, user_id={117: 100})).stream(0)
    with pytest.raises(BadBatch, match="user_id"):
        list(islice(stream, 20))
    assert list(stream) == []


@pytest.mark.parametrize(("cells", "message"), BAD)
def test_tolerated_bad_rows_become_weightless_copies(tmp_path, cells, message):
    data = changed(tmp_path, **cells)
    columns = made.rows_of(made.SCHEMA, 200)
    one = reader(data, max_bad_share=0.02, quarantine=tmp_path / "bad")
    seen = 0
    for batch in [*islice(one.stream(0), 30), *one.sweep()]:
        bad = batch.index == 117
        assert (batch.weight[bad] == 0).all()
        assert torch.isfinite(batch.dense).all()
        assert batch.sparse.values().min() >= 0
        seen += int(bad.sum())
        good = [i for i, row in enumerate(batch.index.tolist()) if row != 117]
        assert batch.dense[good].tolist() == [[columns[n][batch.index[i]] for n in ("price", "age")] for i in good]
    assert seen >= 3
    assert one.bad_rows == 1
    (line,) = (tmp_path / "bad" / "quarantine.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["row"] == 117
    assert kept["file"].endswith("part-00000.parquet")
    assert message.split("{}")[0] in kept["reason"]


def test_too_many_bad_rows_fail(tmp_path):
    data = changed(tmp_path, user_id=dict.fromkeys(range(0, 200, 20), 100))
    one = reader(data, max_bad_share=0.049, quarantine=tmp_path / "bad")
    with pytest.raises(BadBatch, match=r"10 of 200 rows are bad, allowed is a share of 0.049"):
        list(one.sweep())
    assert len(list(reader(data, max_bad_share=0.05, quarantine=tmp_path / "other").sweep())) == 13
    stream = reader(data, max_bad_share=0.049, quarantine=tmp_path / "third").stream(0)
    with pytest.raises(BadBatch, match=r"10 of 200 rows are bad"):
        list(islice(stream, 14))


def test_a_row_group_of_bad_rows_only(tmp_path):
    data = changed(tmp_path, user_id=dict.fromkeys(range(50, 100), 100))
    for batch in reader(data, max_bad_share=0.5, quarantine=tmp_path / "bad").sweep():
        bad = (batch.index >= 50) & (batch.index < 100)
        assert (batch.weight[bad] == 0).all()
        assert (batch.dense[bad] == 0).all()


def with_type(column, kind):
    """The made columns, one of another type."""
    table = pa.table(made.rows_of(made.SCHEMA, 200))
    return table.schema.set(table.schema.get_field_index(column), pa.field(column, kind))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()])
def test_ids_of_any_integer_type(tmp_path, kind):
    columns = made.rows_of(made.SCHEMA, 200)
    for batch in reader(changed(tmp_path, schema=with_type("user_id", kind))).sweep():
        check_rows(batch, columns)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("price", pa.float64()),
        ("liked", pa.large_list(pa.int16())),
        ("history.age", pa.list_(pa.float64())),
        ("when", pa.uint64()),
    ],
)
def test_other_types_that_fit(tmp_path, column, kind):
    columns = made.rows_of(made.SCHEMA, 200)
    for batch in reader(changed(tmp_path, schema=with_type(column, kind))).sweep():
        check_rows(batch, columns)


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        ("user_id", pa.float64(), "column 'user_id' has type double, expected int32"),
        ("user_id", pa.string(), "column 'user_id' has type string, expected int32"),
        ("price", pa.string(), "column 'price' has type string, expected float"),
        ("liked", pa.list_(pa.float32()), "column 'liked' has type list<.*: float>, expected list<.*: int32 not null>"),
        ("when", pa.float64(), "column 'when' has type double, expected int64"),
    ],
)
def test_wrong_types_are_refused(tmp_path, column, kind, expected):
    columns = made.rows_of(made.SCHEMA, 200)
    if pa.types.is_string(kind):
        columns[column] = [str(value) for value in columns[column]]
    made.make(tmp_path / "d", made.SCHEMA, train=200)
    data = Dataset.open(regroup(tmp_path / "d", columns, 50, 1, with_type(column, kind)))
    with pytest.raises(SchemaError, match=expected):
        next(reader(data).sweep())


def test_a_list_where_one_value_belongs(tmp_path):
    columns = made.rows_of(made.SCHEMA, 200) | {"user_id": [[1]] * 200}
    made.make(tmp_path / "d", made.SCHEMA, train=200)
    data = Dataset.open(regroup(tmp_path / "d", columns, 50, 1))
    with pytest.raises(SchemaError, match="column 'user_id' has type list"):
        next(reader(data).sweep())


def test_a_missing_column_names_the_nearest(tmp_path):
    columns = made.rows_of(made.SCHEMA, 200)
    columns["user_ids"] = columns.pop("user_id")
    made.make(tmp_path / "d", made.SCHEMA, train=200)
    data = Dataset.open(regroup(tmp_path / "d", columns, 50, 1))
    with pytest.raises(SchemaError, match=r"no column 'user_id'. Did you mean 'user_ids'\?"):
        next(reader(data).sweep())


def test_further_columns_are_ignored(tmp_path):
    columns = made.rows_of(made.SCHEMA, 200)
    made.make(tmp_path / "d", made.SCHEMA, train=200)
    data = Dataset.open(regroup(tmp_path / "d", columns | {"note": ["x"] * 200}, 50, 1))
    for batch in reader(data).sweep():
        check_rows(batch, columns)


def test_a_truncated_file(tmp_path):
    data = changed(tmp_path)
    path = data.split("train").paths[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"part-00000.parquet: is no readable Parquet file"):
        next(reader(data).stream(0))


def test_row_groups_unlike_the_manifest(tmp_path):
    data = changed(tmp_path)
    pq.write_table(pa.table(made.rows_of(made.SCHEMA, 200)), data.split("train").paths[0], row_group_size=40)
    with pytest.raises(DataError, match="holds 200 rows in 5 row groups, the manifest says 200 in 4"):
        next(reader(data).stream(0))


def test_ids_beyond_int32(tmp_path):
    schema = made.FLAT.model_copy(update={"tables": (made.FLAT.tables[0].model_copy(update={"rows": 1 << 33}),)})
    columns = made.rows_of(schema, 100)
    batch = next(Reader(made.make(tmp_path / "d", schema, train=100), "train", batch_size=100, window_rows=10).sweep())
    assert batch.sparse["user_id"].values().tolist() == columns["user_id"]


def test_falling_list_offsets():
    """No Parquet file can hold them; a decoder that trusted them would read elsewhere."""
    from thresher.data.columns import columns_of
    from thresher.data.decode import Decoder, by_row

    columns = made.rows_of(made.SCHEMA, 3)
    table = pa.table(columns)
    offsets = pa.array([0, 3, 1, 4], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.array([1, 2, 3, 4]))
    table = table.set_column(table.column_names.index("history"), "history", lists)
    block, faults = Decoder(columns_of(made.SCHEMA)).decode(table, 0)
    assert by_row(faults)[1] == "feature 'history' of table 'items': list offsets 3, 1 at {place} decrease"
    assert block.void.all()
