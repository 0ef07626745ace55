"""Parsing and encoding: what good rows become, and the reason that each kind of bad row is given."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.data.encode import Encoder, Moments
from thresher.data.hashing import hash_column
from thresher.data.schema import (
    RAW_IDS,
    DenseFeature,
    Feature,
    Group,
    Label,
    Schema,
    SequenceFeature,
    SideColumn,
    SparseFeature,
    Table,
    Time,
    Weight,
)
from thresher.data.vocabulary import Vocabulary
from thresher.errors import SchemaError

TABLES = (
    Table(name="hashed", rows=1000),
    Table(name="index", rows=10, ids="index"),
    Table(name="words", rows=100, ids="vocabulary"),
    Table(name="raw", rows=5, ids="raw"),
)
HISTORY = SequenceFeature(
    name="h", table="index", max_length=3, side=(SideColumn(name="cat", table="hashed"), SideColumn(name="age"))
)


def schema(*features: Feature) -> Schema:
    return Schema(name="s", tables=TABLES, features=features)


def encode(features: tuple[Feature, ...], **columns: Any) -> tuple[dict[str, list[Any]], dict[int, str]]:
    """Encoded columns and reasons by row."""
    encoder = Encoder(schema(*features), {"words": Vocabulary(["b", "a"], [2, 1])}, {"x": Moments(4, 3.0, 16.0)})
    encoded, parsed = encoder.encode(pa.table(columns))
    assert parsed.kept.tolist() == [r for r in range(len(next(iter(columns.values())))) if r not in dict(parsed.bad)]
    assert not any(column.null_count for column in encoded.columns)
    return encoded.to_pydict(), dict(parsed.bad)


def test_physical_types() -> None:
    features = (
        SparseFeature(name="one", table="hashed"),
        SparseFeature(name="some", table="words", many=True, weights="w"),
        HISTORY,
        DenseFeature(name="d"),
        Label(name="y"),
        Weight(name="weight"),
        Time(name="t"),
        Group(name="g"),
    )
    raw = {"one": ["a"], "some": [["b"]], "w": [[1]], "h": [[1]], "h.cat": [["c"]], "h.age": [[2]]}
    table = pa.table(raw | {"d": [1], "y": [1], "weight": [2], "t": [3], "g": ["user"]})
    encoded, parsed = Encoder(schema(*features), {"words": Vocabulary(["b"], [1])}).encode(table)
    assert not parsed.bad
    assert {field.name: str(field.type).replace("item: ", "") for field in encoded.schema} == {
        "one": "int64",
        "some": "list<int64>",
        "some.weights": "list<float>",
        "h": "list<int64>",
        "h.cat": "list<int64>",
        "h.age": "list<float>",
        "d": "float",
        "y": "float",
        "weight": "float",
        "t": "int64",
        "g": "int64",
    }


def test_one_id_of_every_kind_of_table() -> None:
    features = tuple(SparseFeature(name=name, table=name) for name in ("hashed", "index", "words"))
    rows, bad = encode(features, hashed=["a", "", None], index=["9", "0", "3"], words=["a", "zz", ""])
    assert not bad
    expected = hash_column(pa.array(["a", None, None]), "hashed", 1000).tolist()
    assert rows == {"hashed": expected, "index": [9, 0, 3], "words": [3, 1, 0]}


def test_raw_ids_are_hashed_onto_more_numbers_than_there_are_rows() -> None:
    rows, bad = encode((SparseFeature(name="raw", table="raw"),), raw=["a", "b", "a", ""])
    first, second, again, missing = rows["raw"]
    assert not bad
    assert (again, missing) == (first, 0)
    assert len({first, second}) == 2
    assert all(5 <= row < RAW_IDS for row in (first, second))


@given(st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1), st.integers(1, 4))
def test_sequences_keep_their_newest(lists: list[list[int]], longest: int) -> None:
    feature = SequenceFeature(name="h", table="index", max_length=longest, side=(SideColumn(name="age"),))
    ages = [[float(i) for i in range(len(ids))] for ids in lists]
    column = pa.array(lists, pa.list_(pa.int64()))
    rows, bad = encode((feature,), **{"h": column, "h.age": pa.array(ages, pa.list_(pa.float64()))})
    assert not bad
    assert rows["h"] == [ids[-longest:] for ids in lists]
    assert rows["h.age"] == [age[-longest:] for age in ages]


@given(st.lists(st.none() | st.lists(st.none() | st.text("ab", max_size=2), max_size=4), min_size=1))
def test_hashed_lists_are_hashed_elements(lists: list[list[str | None] | None]) -> None:
    feature = SparseFeature(name="m", table="hashed", many=True)
    for kind in (pa.list_(pa.string()), pa.large_list(pa.string())):
        rows, _ = encode((feature,), m=pa.array(lists, kind))
        assert rows["m"] == [hash_column(pa.array(ids or [], pa.string()), "hashed", 1000).tolist() for ids in lists]


def test_a_slice_of_lists_is_read_where_it_starts() -> None:
    whole = pa.array([[1, 2], [3], [], [4, 5, 6]], pa.list_(pa.int64()))
    rows, bad = encode((SparseFeature(name="m", table="index", many=True),), m=whole.slice(1))
    assert (rows["m"], bad) == ([[3], [], [4, 5, 6]], {})


def test_dictionaries_inside_lists() -> None:
    names = pa.DictionaryArray.from_arrays(pa.array([1, 0, None, 1], pa.int32()), pa.array(["a", "b"]))
    lists = pa.ListArray.from_arrays(pa.array([0, 3, 4], pa.int32()), names)
    rows, _ = encode((SparseFeature(name="m", table="words", many=True),), m=lists)
    assert rows["m"] == [[2, 3, 0], [2]]


def test_dense_transforms_and_fill() -> None:
    features = (
        DenseFeature(name="plain", fill=-1.0),
        DenseFeature(name="log", transform="log1p", fill=7.0),
        DenseFeature(name="x", transform="standard"),
    )
    rows, bad = encode(features, plain=["1.5", "", None], log=[math.e - 1, -(math.e - 1), None], x=[3, 5, None])
    assert not bad
    assert rows["plain"] == [1.5, -1.0, -1.0]
    assert rows["log"] == pytest.approx([1.0, -1.0, 7.0])
    assert rows["x"] == [0.0, 1.0, 0.0]  # mean 3, deviation 2


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), max_size=5))
def test_moments_of_parts_are_those_of_the_whole(parts: list[list[float]]) -> None:
    moments = Moments()
    for part in parts:
        moments = moments.add(np.array(part))
    whole = np.array([value for part in parts for value in part])
    if len(whole):
        assert moments.mean == pytest.approx(whole.mean(), abs=1e-6)
        assert moments.m2 == pytest.approx(((whole - whole.mean()) ** 2).sum(), rel=1e-6, abs=1e-3)


def test_a_constant_standardises_to_zero() -> None:
    assert Moments().add(np.full(5, 2.0)).std == 1.0


def test_times_and_groups() -> None:
    when = pa.array([1_500_000_000_999, 0], pa.timestamp("ms"))
    rows, bad = encode((Time(name="t"), Group(name="g")), t=when, g=["alice", "bob"])
    assert not bad
    assert rows["t"] == [1_500_000_000, 0]
    assert len(set(rows["g"])) == 2
    rows, bad = encode((Time(name="t"), Group(name="g")), t=[1.0, 2.0], g=[12, -1])
    assert (rows, bad) == ({"t": [1, 2], "g": [12, -1]}, {})


ONE = SparseFeature(name="f", table="index")
MANY = SparseFeature(name="f", table="index", many=True)
WEIGHED = SparseFeature(name="f", table="index", many=True, weights="w")
BAD: list[tuple[Feature, dict[str, list[Any]], str]] = [
    (ONE, {"f": [10]}, "feature 'f' of table 'index': id 10 is outside 0..9"),
    (ONE, {"f": [-1]}, "feature 'f' of table 'index': id -1 is outside 0..9"),
    (ONE, {"f": ["x"]}, "feature 'f' of table 'index': 'x' is no 64-bit integer"),
    (ONE, {"f": [None]}, "feature 'f' of table 'index': the value is missing"),
    (ONE, {"f": [str(2**64)]}, "feature 'f' of table 'index': '18446744073709551616' is no 64-bit integer"),
    (MANY, {"f": [[1, 99]]}, "feature 'f' of table 'index': id 99 is outside 0..9"),
    (MANY, {"f": [[1, None]]}, "feature 'f' of table 'index': the value is missing"),
    (WEIGHED, {"f": [[1, 2]], "w": [[0.5]]}, "feature 'f': 2 ids but 1 values in 'w'"),
    (WEIGHED, {"f": [[1]], "w": [[-0.5]]}, "feature 'f', weights 'w': -0.5 is negative"),
    (WEIGHED, {"f": [[1]], "w": [[None]]}, "feature 'f', weights 'w': a value is missing"),
    (WEIGHED, {"f": [[1]], "w": [[math.inf]]}, "feature 'f', weights 'w': inf is not finite in float32"),
    (HISTORY, {"f": [[1]], "f.cat": [["a", "b"]], "f.age": [[0]]}, "feature 'f': 1 ids but 2 values in 'f.cat'"),
    (
        HISTORY,
        {"f": [[1, 2, 3, 4]], "f.cat": [["a"] * 4], "f.age": [[0] * 3]},
        "feature 'f': 4 ids but 3 values in 'f.age'",
    ),
    (
        HISTORY,
        {"f": [[1]], "f.cat": [["a"]], "f.age": [[math.nan]]},
        "side column 'f.age': nan is not finite in float32",
    ),
    (DenseFeature(name="f"), {"f": ["1,5"]}, "feature 'f': '1,5' is no number"),
    (DenseFeature(name="f"), {"f": [math.nan]}, "feature 'f': nan is not finite in float32"),
    (DenseFeature(name="f"), {"f": ["-inf"]}, "feature 'f': '-inf' is not finite in float32"),
    (DenseFeature(name="f"), {"f": [1e39]}, "feature 'f': 1e+39 is not finite in float32"),
    (Label(name="f"), {"f": [2]}, "feature 'f': 2 is not 0 or 1"),
    (Label(name="f"), {"f": ["yes"]}, "feature 'f': 'yes' is no number"),
    (Label(name="f"), {"f": [None]}, "feature 'f': the value is missing"),
    (Label(name="f", task="regression"), {"f": [math.inf]}, "feature 'f': inf is not finite in float32"),
    (Weight(name="f"), {"f": [-0.1]}, "feature 'f': -0.1 is negative"),
    (Weight(name="f"), {"f": [None]}, "feature 'f': the value is missing"),
    (Time(name="f"), {"f": ["2017-01-01"]}, "feature 'f': '2017-01-01' is no 64-bit integer"),
    (Time(name="f"), {"f": [1.5]}, "feature 'f': 1.5 is no 64-bit integer"),
    (Group(name="f"), {"f": [None]}, "feature 'f': the value is missing"),
]


@pytest.mark.parametrize(("feature", "columns", "reason"), BAD, ids=[reason for _, _, reason in BAD])
def test_bad_row(feature: Feature, columns: dict[str, list[Any]], reason: str) -> None:
    """The bad row, and it alone, leaves with its reason, wherever it stands."""
    good: dict[str, Any] = {"f": 1, "w": None, "f.cat": None, "f.age": None}
    if isinstance(feature, SequenceFeature) or (isinstance(feature, SparseFeature) and feature.many):
        good["f"] = []
    feature = feature.model_copy(update={"name": "f"})
    for place in range(3):
        mixed = {name: [good[name]] * place + values + [good[name]] * (2 - place) for name, values in columns.items()}
        mixed = {name: [_like(values, columns[name][0]) for values in column] for name, column in mixed.items()}
        rows, bad = encode((feature,), **mixed)
        assert bad == {place: reason}
        assert len(rows["f"]) == 2


def _like(value: Any, example: Any) -> Any:
    return str(value) if isinstance(example, str) and isinstance(value, int) else value


def test_the_first_of_several_reasons_is_given() -> None:
    rows, bad = encode((ONE, Label(name="y")), f=[50, 3, 60], y=[7, 5, 1])
    assert rows == {"f": [], "y": []}
    assert bad == {
        0: "feature 'f' of table 'index': id 50 is outside 0..9",
        1: "feature 'y': 5 is not 0 or 1",
        2: "feature 'f' of table 'index': id 60 is outside 0..9",
    }


@pytest.mark.parametrize(
    ("feature", "column", "message"),
    [
        (
            SparseFeature(name="user", table="hashed"),
            {"usr": [1]},
            "feature 'user': no column 'user'. Did you mean 'usr'?",
        ),
        (SparseFeature(name="u", table="hashed"), {"u": [1.5]}, "feature 'u' of table 'hashed': ids of type double"),
        (SparseFeature(name="u", table="hashed"), {"u": [[1]]}, "ids of type list<item: int64>"),
        (SparseFeature(name="u", table="hashed", many=True), {"u": [1]}, "column 'u' holds int64. Give a list a row"),
        (DenseFeature(name="d"), {"d": [[1]]}, "feature 'd': holds list<item: int64>, not numbers"),
    ],
)
def test_columns_that_can_never_fit(feature: Feature, column: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(SchemaError) as error:
        encode((feature,), **column)
    assert message in error.value.message


def test_no_rows() -> None:
    columns = {"h": pa.array([], pa.list_(pa.int64())), "h.cat": pa.array([], pa.list_(pa.string()))}
    rows, bad = encode((HISTORY,), **columns, **{"h.age": pa.array([], pa.list_(pa.float64()))})
    assert (rows, bad) == ({"h": [], "h.cat": [], "h.age": []}, {})
