"""Hashing: pinned values, and what must hold for any values."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.data.hashing import digest_column, hash_column, mix, uniform
from thresher.errors import SchemaError

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)


def test_golden_rows() -> None:
    """Trained tables and stored data depend on these numbers: a change breaks every data set there is."""
    values = pa.array(["a", "b", "68fd1e64", "0", "17", "München", "", None])
    assert hash_column(values, "users", 1_000_003).tolist() == [247411, 729302, 425401, 243111, 545962, 277056, 0, 0]
    assert hash_column(values, "items", 1_000_003).tolist() == [913131, 380774, 277098, 620514, 370441, 788331, 0, 0]


def test_golden_draws() -> None:
    """Random splits and negatives depend on these."""
    assert mix(np.arange(3), 0).tolist() == [10542502131000326423, 14873314241149440729, 4154467613789910010]
    assert uniform(np.arange(3), 7).tolist() == [0.53274481450472, 0.0018488165804152468, 0.3053528211705535]


@given(st.lists(st.none() | INT64), st.integers(2, 10**9))
def test_an_integer_hashes_as_its_decimal_string(values: list[int | None], rows: int) -> None:
    numbers = hash_column(pa.array(values, pa.int64()), "t", rows)
    texts = hash_column(pa.array([None if v is None else str(v) for v in values], pa.string()), "t", rows)
    assert numbers.tolist() == texts.tolist()


@given(st.lists(st.none() | TEXT), st.integers(2, 50))
def test_rows_are_a_function_of_the_value_alone(values: list[str | None], rows: int) -> None:
    array = pa.array(values, pa.string())
    hashed = hash_column(array, "t", rows)
    alone = [int(hash_column(pa.array([value], pa.string()), "t", rows)[0]) for value in values]
    assert hashed.tolist() == alone
    assert hash_column(array.dictionary_encode(), "t", rows).tolist() == alone
    assert hash_column(array.cast(pa.large_string()), "t", rows).tolist() == alone
    missing = np.array([not value for value in values], bool)
    assert ((hashed == 0) == missing).all()
    assert ((hashed >= 0) & (hashed < rows)).all()


def test_two_rows_leave_one_for_all_values() -> None:
    assert hash_column(pa.array(["a", "b", None]), "t", 2).tolist() == [1, 1, 0]


def test_rows_fill_evenly_and_tables_do_not_correlate() -> None:
    values = pa.array(np.arange(200_000))
    users, items = hash_column(values, "users", 1001), hash_column(values, "items", 1001)
    expected = 200_000 / 1000
    for rows in (users, items):
        counts = np.bincount(rows, minlength=1001)[1:]
        assert ((counts - expected) ** 2 / expected).sum() < 1200  # chi-square with 999 degrees: p about 1e-5
    assert abs((users == items).mean() - 1e-3) < 5e-4


def test_booleans_hash_as_0_and_1() -> None:
    assert hash_column(pa.array([True, False]), "t", 99).tolist() == hash_column(pa.array([1, 0]), "t", 99).tolist()


def test_floats_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"ids of type double. Give ids as strings or integers"):
        hash_column(pa.array([1.0]), "t", 10)


def test_one_row_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"table 't': 1 row\(s\) leave none to hash onto. Give rows >= 2"):
        hash_column(pa.array(["a"]), "t", 1)


@given(st.lists(st.none() | TEXT))
def test_digests_stand_for_their_strings(values: list[str | None]) -> None:
    digests = digest_column(pa.array(values, pa.string())).to_pylist()
    assert len(set(digests)) == len({value or "" for value in values})
    assert all(digest == 0 for digest, value in zip(digests, values, strict=True) if not value)


@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 2**31))
def test_draws_depend_on_their_number_only(start: int, length: int, seed: int) -> None:
    together = uniform(np.arange(start, start + length), seed)
    assert together.tolist() == [float(uniform(np.array([start + i]), seed)[0]) for i in range(length)]
    assert ((together >= 0) & (together < 1)).all()
