"""Text sources: every line of a file comes out as a row or as a bad row, with its number; faults name their place."""

import bz2
import gzip
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thresher.data.quarantine import BadRow
from thresher.data.sources import Layout, choose_files, find_file, first_line, header, lines, read_delimited, read_lines
from thresher.errors import DataError, SchemaError

AB = Layout("\t", ("a", "b"))
CSV = Layout(",", ("a", "b"), quoted=True)


def read(path: Path, layout: Layout = AB, required=()) -> tuple[list[dict], list[int], list[BadRow]]:
    parts = list(read_delimited(path, layout, required))
    rows = [row for part in parts for row in part.table.to_pylist()]
    return rows, [int(n) for part in parts for n in part.rows], [bad for part in parts for bad in part.bad]


def write(folder: Path, data: bytes, name: str = "x.txt") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_rows_come_in_order_with_their_line_numbers(tmp_path):
    rows, numbers, bad = read(write(tmp_path, b"1\tx\n2\t\n\n3\tz"))
    assert rows == [{"a": "1", "b": "x"}, {"a": "2", "b": None}, {"a": "3", "b": "z"}]
    assert numbers == [1, 2, 4]
    assert bad == []


def test_lines_of_another_width_are_set_aside(tmp_path):
    path = write(tmp_path, b"1\tx\nonly one\n2\ty\tz\n3\tw\n")
    rows, numbers, bad = read(path)
    assert [row["a"] for row in rows] == ["1", "3"]
    assert numbers == [1, 4]
    assert bad == [
        BadRow(str(path), 2, "line: 1 columns, expected 2", "only one"),
        BadRow(str(path), 3, "line: 3 columns, expected 2", "2\ty\tz"),
    ]


def test_undecodable_bytes_are_set_aside_with_their_text(tmp_path):
    rows, numbers, bad = read(write(tmp_path, b"1\tx\n2\t\xff\xfe\n3\tz\n"))
    assert (len(rows), numbers) == (2, [1, 3])
    assert [(row.row, row.reason, row.raw) for row in bad] == [
        (2, "line: holds bytes that are not text in UTF-8", "2\t\\xff\\xfe")
    ]


def test_latin_1_is_decoded_on_demand(tmp_path):
    rows, _, bad = read(write(tmp_path, b"1\tcaf\xe9\n"), Layout("\t", ("a", "b"), encoding="latin-1"))
    assert (rows, bad) == ([{"a": "1", "b": "café"}], [])


def test_line_ends_of_windows_are_no_part_of_a_value(tmp_path):
    rows, numbers, _ = read(write(tmp_path, b"1\tx\r\n\r\n2\ty\r\n"))
    assert rows == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    assert numbers == [1, 3]


def test_a_carriage_return_inside_a_line_does_not_shift_line_numbers(tmp_path):
    rows, numbers, bad = read(write(tmp_path, b"1\tx\n2\ty\r3\tz\n4\tw\n"))
    assert ([row["a"] for row in rows], numbers) == (["1", "4"], [1, 3])
    assert [(row.row, row.reason) for row in bad] == [(2, "line: holds a carriage return")]


def test_an_open_quote_does_not_swallow_the_lines_behind_it(tmp_path):
    rows, numbers, bad = read(write(tmp_path, b'1,"x\n2,y\n3,"a,b"\n4,z\n'), CSV)
    assert ([row["b"] for row in rows], numbers) == (["y", "a,b", "z"], [2, 3, 4])
    assert [(row.row, row.raw) for row in bad] == [(1, '1,"x')]


def test_misplaced_quotes_that_join_lines_are_found_one_by_one(tmp_path):
    rows, numbers, bad = read(write(tmp_path, b'1,p\nx"y,"z\n2,q\n3,r\n4,s\n'), CSV)
    assert ([row["b"] for row in rows], numbers) == (["p", "q", "r", "s"], [1, 3, 4, 5])
    assert [(row.row, row.reason, row.raw) for row in bad] == [(2, "line: its quotes cannot be parsed", 'x"y,"z')]


def test_quotes_are_plain_characters_unless_the_layout_quotes(tmp_path):
    rows, _, bad = read(write(tmp_path, b'1\t"x\n2\ty\n'))
    assert ([row["b"] for row in rows], bad) == (['"x', "y"], [])


def test_a_delimiter_of_two_characters(tmp_path):
    rows, _, bad = read(write(tmp_path, b"1::Star Wars: IV\n2::x::y\n"), Layout("::", ("a", "b")))
    assert rows == [{"a": "1", "b": "Star Wars: IV"}]
    assert [row.raw for row in bad] == ["2::x::y"]


@pytest.mark.parametrize(("name", "pack"), [("x.gz", gzip.compress), ("x.txt", gzip.compress), ("x.bz2", bz2.compress)])
def test_compressed_files_read_as_plain_ones(tmp_path, name, pack):
    rows, numbers, _ = read(write(tmp_path, pack(b"1\tx\n2\ty\n"), name))
    assert ([row["a"] for row in rows], numbers) == (["1", "2"], [1, 2])


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    rows, numbers, _ = read(write(tmp_path, b"\xef\xbb\xbfa\tb\n1\tx\n"), Layout("\t"), ("a", "b"))
    assert (rows, numbers) == ([{"a": "1", "b": "x"}], [2])


def test_numbers_hold_across_blocks_and_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
    monkeypatch.setattr(lines, "MAX_LINES", 3)
    text = "".join(f"{i}\tv{i}\n" if i % 7 else f"bad {i}\n" for i in range(1, 500))
    rows, numbers, bad = read(write(tmp_path, text.encode()))
    assert [int(row["a"]) for row in rows] == numbers == [i for i in range(1, 500) if i % 7]
    assert [row.row for row in bad] == list(range(7, 500, 7))


def test_parallel_arrow_does_not_scramble_rows(tmp_path):
    before = pa.cpu_count()
    pa.set_cpu_count(4)
    try:
        path = write(tmp_path, "".join(f"{i}\tx\n" for i in range(1, 200_001)).encode())
        _, numbers, _ = read(path)
        values = np.concatenate([p.table.column("a").to_numpy().astype(np.int64) for p in read_delimited(path, AB)])
    finally:
        pa.set_cpu_count(before)
    assert np.array_equal(values, np.arange(1, 200_001))
    assert numbers == values.tolist()


line = st.one_of(
    st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")),
    st.sampled_from(
        [b"1\tx", b"1,x", b'1,"x"', b'a"b,"c', b'"', b"", b"\r", b"2\ty\r", b"\xff", b"a\tb\tc", b'"a","b"']
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(line, max_size=12), layout=st.sampled_from([AB, CSV]), last=st.sampled_from([b"", b"\n"]))
def test_every_line_is_a_row_or_a_bad_row_or_blank(tmp_path, content, layout, last):
    content = [b"1,x" if layout is CSV else b"1\tx", *content]  # the first is good, or the delimiter would be in doubt
    rows, numbers, bad = read(write(tmp_path, b"\n".join(content) + last), layout)
    seen = sorted(numbers + [row.row for row in bad])
    assert seen == [n for n, text in enumerate(content, start=1) if text.removesuffix(b"\r")]
    assert len(rows) == len(numbers)
    assert not any("\n" in (value or "") for row in rows for value in row.values())


def broken(tmp_path: Path, kind: str) -> Path:
    whole = gzip.compress(os.urandom(100_000))
    flipped = bytearray(whole)
    flipped[50_000] ^= 1
    return {
        "empty": lambda: write(tmp_path, b""),
        "blank": lambda: write(tmp_path, b"\n\r\n\n"),
        "missing": lambda: tmp_path / "nowhere.txt",
        "folder": lambda: tmp_path,
        "truncated": lambda: write(tmp_path, whole[:50_000], "x.gz"),
        "flipped": lambda: write(tmp_path, bytes(flipped), "x.gz"),
        "plain as gz": lambda: write(tmp_path, b"1\tx\n", "x.gz"),
        "commas": lambda: write(tmp_path, b"1,x\n2,y\n"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty"),
        ("blank", "holds no rows"),
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("truncated", "Truncated compressed stream"),
        ("flipped", "cannot be read"),
        ("plain as gz", "incorrect header check"),
        ("commas", "the first line has 1 columns parted by a tab, expected 2; ',' parts it into 2"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, kind, message):
    path = broken(tmp_path, kind)
    with pytest.raises(DataError) as error:
        read(path)
    assert message in error.value.message
    assert error.value.where.startswith(str(path))
    assert error.value.fix


def test_an_unreadable_file_is_named(tmp_path):
    path = write(tmp_path, b"1\tx\n")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataError, match="Permission denied"):
        read(path)


def test_a_file_without_line_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 100)
    with pytest.raises(DataError, match="has no line end"):
        read(write(tmp_path, b"x" * 5000))


def test_a_header_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="below its header: holds no rows"):
        read(write(tmp_path, b"a\tb\n"), Layout("\t"))


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    path = write(tmp_path, b"user\titem\n1\t2\n")
    with pytest.raises(SchemaError) as error:
        read(path, Layout("\t"), ("user", "itemm"))
    assert error.value.where == str(path)
    assert error.value.what == "no column 'itemm'"
    assert "did you mean 'item'?" in error.value.fix


def test_a_column_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="column 'a' stands twice"):
        read(write(tmp_path, b"a\ta\n1\t2\n"), Layout("\t"))


def test_a_header_with_another_delimiter_says_so(tmp_path):
    with pytest.raises(DataError, match="parted by a tab, expected 2; ',' parts it into 2"):
        header(write(tmp_path, b"a,b\n1,2\n"), Layout("\t"), ("a", "b"))


def test_trailing_empty_columns_of_the_first_line_count(tmp_path):
    assert first_line(write(tmp_path, b"\n1\t\t\n2\n")) == "1\t\t"


def test_first_line_may_be_a_bad_one(tmp_path):
    assert first_line(write(tmp_path, b"\xff\n2\n")) == "\\xff"


def test_lines_as_texts(tmp_path):
    (part,) = read_lines(write(tmp_path, b" a b \r\nc\n"))
    assert part.texts().to_pylist() == ["a b", "c"]


def test_files_of_a_folder_come_in_natural_order(tmp_path):
    for name in ("day_10", "day_2", "other"):
        write(tmp_path, b"1\n", name)
    assert [path.name for path in choose_files((tmp_path,), ("train.txt", "day_*"), "log")] == ["day_2", "day_10"]


def test_choosing_files_names_what_is_missing(tmp_path):
    write(tmp_path, b"1\n", "train.txt")
    with pytest.raises(DataError, match=r"no such file. Did you mean 'train.txt'\?"):
        choose_files((tmp_path / "trainn.txt",), ("*",), "log")
    with pytest.raises(DataError, match=r"no such file. Check the path"):
        choose_files((tmp_path / "something else",), ("*",), "log")
    with pytest.raises(DataError, match=r"no log \(\*\.csv\)"):
        choose_files((tmp_path,), ("*.csv",), "log")
    with pytest.raises(DataError, match="no log given"):
        choose_files((), ("*.csv",), "log")


def test_finding_a_file_names_what_is_there(tmp_path):
    gz = write(tmp_path, b"1\n", "u.data.gz")
    assert find_file(tmp_path, ("u.data",), "ratings") == gz
    with pytest.raises(DataError, match=r"no profiles \(u.user\). Allowed: u.data.gz"):
        find_file(tmp_path, ("u.user",), "profiles")
    with pytest.raises(DataError, match="no such folder"):
        find_file(tmp_path / "nowhere", ("u.user",), "profiles")
