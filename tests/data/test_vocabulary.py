"""Vocabularies: order, bounds, round trips, files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.data import vocabulary
from thresher.data.schema import Table
from thresher.data.vocabulary import Vocabulary, VocabularyBuilder
from thresher.errors import DataError

VALUES = st.lists(st.none() | st.sampled_from(["", "a", "b", "c", "é", "10", "9", "Z"]) | st.text("xyz", max_size=3))


def build(*columns: pa.Array, rows: int = 1000, min_count: int = 1) -> Vocabulary:
    builder = VocabularyBuilder(Table(name="t", rows=rows, ids="vocabulary", min_count=min_count))
    for column in columns:
        builder.add(column)
    return builder.build()


def strings(values: list[str | None]) -> pa.Array:
    return pa.array(values, pa.string())


def test_rows_go_by_count_then_value() -> None:
    made = build(strings(["b", "c", "a", "c", None, "", "b", "d"]))
    assert (made.values, made.counts, made.rows) == (["b", "c", "a", "d"], [2, 2, 1, 1], 6)
    assert made.encode(strings(["c", "b", None, "", "new"])).tolist() == [3, 2, 0, 0, 1]


@given(VALUES, st.integers(1, 3), st.integers(2, 8))
def test_is_the_brute_force_one(values: list[str | None], min_count: int, rows: int) -> None:
    made = build(strings(values), rows=rows, min_count=min_count)
    counts = Counter(value for value in values if value)
    ordered = sorted((value for value in counts if counts[value] >= min_count), key=lambda v: (-counts[v], v.encode()))
    assert made.values == ordered[: rows - 2]
    assert made.counts == [counts[value] for value in made.values]


@given(VALUES, st.randoms(use_true_random=False), st.integers(1, 5))
def test_neither_order_nor_chunks_matter(values: list[str | None], random: object, size: int) -> None:
    shuffled = values[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    chunks = [strings(shuffled[i : i + size]) for i in range(0, len(shuffled), size)]
    assert build(*chunks).values == build(strings(values)).values


def test_compacting_keeps_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_COMPACT_VALUES", 3)
    made = build(*(strings(["a", "b", f"only{i}"]) for i in range(20)))
    assert made.counts[:2] == [20, 20]
    assert len(made.values) == 22


@given(VALUES)
def test_known_values_come_back(values: list[str | None]) -> None:
    made = build(strings(values))
    assert made.decode(made.encode(strings(values))) == [value or None for value in values]


def test_integers_and_dictionaries_are_their_strings() -> None:
    made = build(pa.array([5, 5, 7]), strings(["7", "7"]), strings(["x"]).dictionary_encode())
    assert made.values == ["7", "5", "x"]
    assert made.encode(pa.array([7, None, 8])).tolist() == [2, 0, 1]


def test_an_unused_entry_of_a_dictionary_is_not_seen() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, None], pa.int32()), pa.array(["a", "unused"]))
    assert build(column).values == ["a"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = build(strings(["b", "a", "b", "ü"]))
    made.save(tmp_path / "vocabulary" / "t.parquet")
    loaded = Vocabulary.load(tmp_path / "vocabulary" / "t.parquet")
    assert (loaded.values, loaded.counts) == (made.values, made.counts)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.parquet: no such vocabulary. Prepare the data set again"):
        Vocabulary.load(tmp_path / "t.parquet")


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    build(strings(["a"])).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"t.parquet: is no vocabulary: .* Prepare the data set again"):
        Vocabulary.load(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"value": ["a"]}, "is no vocabulary: has columns"),
        ({"value": ["a", "b"], "row": np.array([3, 2]), "count": np.array([1, 1])}, "rows are not 2, 3, 4"),
    ],
)
def test_foreign_file(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        Vocabulary.load(tmp_path / "t.parquet")


@given(st.lists(st.none() | st.integers(0, 300), max_size=40))
def test_few_and_many_distinct_values_are_looked_up_alike(values: list[int | None]) -> None:
    """Columns of many distinct values take another way than those of few."""
    made = build(pa.array(range(200)))
    rows = {None: 0} | {value: made.values.index(str(value)) + 2 for value in range(200)}
    assert made.encode(pa.array(values, pa.int64())).tolist() == [rows.get(value, 1) for value in values]
