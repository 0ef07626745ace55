"""Delimited text as a stream of tables of strings, by pyarrow's CSV parser, block by block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from thresher.data.quarantine import BadRow
from thresher.data.sources.lines import Lines, first_line, read_lines
from thresher.errors import DataError, SchemaError, nearest

_NAMES = {"\t": "a tab", ",": "','", ";": "';'", "|": "'|'", " ": "a space", "::": "'::'", "\x01": "0x01"}
_STAND_IN = "\x1f"  # the parser takes one character only: replaces a longer delimiter


@dataclass(frozen=True)
class Layout:
    """How a delimited file is written.

    Attributes:
        delimiter: one character, or several (``::``).
        columns: names of the columns of a file without a header; empty: its first line names them.
        quoted: values may stand in double quotes; a quoted value ends on its line.
        encoding: ``utf-8`` or ``latin-1``.
    """

    delimiter: str = "\t"
    columns: tuple[str, ...] = ()
    quoted: bool = False
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Part:
    """Some rows of a file.

    Attributes:
        file: its path.
        table: [n] rows of strings; an empty value is null.
        rows: [n] int64 line numbers, counted from 1.
        bad: lines between them that could not be parsed.
    """

    file: str
    table: pa.Table
    rows: NDArray[np.int64]
    bad: tuple[BadRow, ...]


def read_delimited(path: Path, layout: Layout, required: Sequence[str] = ()) -> Iterator[Part]:
    """Rows of a delimited file in file order, at most 65,536 at a time, on the calling thread.

    Args:
        required: columns that must be there.

    Raises:
        DataError: the file cannot be read (see :func:`read_lines`), holds no rows, or has another delimiter.
        SchemaError: a required column is missing, or two have one name; the message names the nearest.
    """
    names = layout.columns or header(path, layout, required)
    seen = False
    quote = b'"' if layout.quoted else b""
    skip = 0 if layout.columns else _header_line(path, layout)
    for lines in read_lines(path, layout.encoding, quote, skip):
        part = _parse(lines, names, layout, str(path))
        if not seen and not part.table.num_rows and len(lines.numbers):
            raise _wrong_delimiter(path, layout, len(names), lines.first())
        seen = seen or bool(part.table.num_rows)
        yield part
    if not seen:
        where = f"{path}" if layout.columns else f"{path}, below its header"
        raise DataError("holds no rows", where=where, fix="give a file with rows")


def header(path: Path, layout: Layout, required: Sequence[str] = ()) -> tuple[str, ...]:
    """The names in a file's first line.

    Raises:
        DataError: the file cannot be read, or another delimiter parts the line.
        SchemaError: a required column is missing, or two have one name.
    """
    line = first_line(path, layout.encoding)
    names = tuple(name.strip().strip('"') for name in line.split(layout.delimiter))
    if len(names) == 1 and len(required) > 1 and _delimiters(line, layout):
        raise _wrong_delimiter(path, layout, len(required), line)
    require(path, names, required)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SchemaError(f"column '{twice[0]}' stands twice in the header", where=str(path), fix="rename one of them")
    return names


def require(path: Path, names: Sequence[str], required: Sequence[str]) -> None:
    """Checks that ``required`` columns are among ``names``.

    Raises:
        SchemaError: names file and column, and the nearest name there is.
    """
    for name in required:
        if name not in names:
            raise SchemaError(f"no column '{name}'", where=str(path), fix=nearest(name, names))


def _header_line(path: Path, layout: Layout) -> int:
    """The number of the header's line."""
    for lines in read_lines(path, layout.encoding):
        if len(lines.numbers):
            return int(lines.numbers[0])
    return 0


def _parse(lines: Lines, names: tuple[str, ...], layout: Layout, file: str) -> Part:
    """Parses lines; where the parser merged some (quotes may do that), halves them until the culprit stands alone."""
    wrong: list[tuple[int, int]] = []
    table = _table(lines.block, names, layout, wrong)
    if table.num_rows + len(wrong) != len(lines.numbers) or (layout.quoted and _ends_open(table)):
        return _halves(lines, names, layout, file)
    if not wrong:
        return Part(file, table, lines.numbers, lines.bad)
    marked = np.zeros(len(lines.numbers), bool)
    marked[[row for row, _ in wrong]] = True
    bad = [
        BadRow(file, row.row, f"line: {count} columns, expected {len(names)}", row.raw)
        for row, (_, count) in zip(lines.take(marked).as_bad(file, ""), wrong, strict=True)
    ]
    return Part(file, table, lines.numbers[~marked], _merged(lines.bad, tuple(bad)))


def _ends_open(table: pa.Table) -> bool:
    """Whether a quote is still open at the end of the last row, so that its line end became part of the value."""
    last = table.slice(max(table.num_rows - 1, 0)).to_pylist()
    return any(value and value.endswith("\n") for row in last for value in row.values())


def _halves(lines: Lines, names: tuple[str, ...], layout: Layout, file: str) -> Part:
    count = len(lines.numbers)
    if count == 1:
        bad = lines.as_bad(file, "line: its quotes cannot be parsed")
        return Part(file, _table(b"", names, layout, []), lines.numbers[:0], _merged(lines.bad, bad))
    first = np.arange(count) < count // 2
    parts = [_parse(Lines(half.block, half.numbers), names, layout, file) for half in map(lines.take, (first, ~first))]
    table = pa.concat_tables([part.table for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    return Part(file, table, rows, _merged(lines.bad, *(part.bad for part in parts)))


def _merged(*bad: tuple[BadRow, ...]) -> tuple[BadRow, ...]:
    return tuple(sorted((row for group in bad for row in group), key=lambda row: row.row))


def _table(block: bytes, names: tuple[str, ...], layout: Layout, wrong: list[tuple[int, int]]) -> pa.Table:
    """Parses whole lines; adds (index of the line, number of columns) of those of another width to ``wrong``."""
    if not block:
        return pa.table({name: pa.array([], pa.string()) for name in names})

    def skip(row: csv.InvalidRow) -> str:
        wrong.append((row.number - 1, row.actual_columns))
        return "skip"

    single = layout.delimiter if len(layout.delimiter) == 1 else _STAND_IN
    return csv.read_csv(
        pa.BufferReader(block.replace(layout.delimiter.encode(), single.encode()) if single == _STAND_IN else block),
        csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=list(names)),
        csv.ParseOptions(
            delimiter=single,
            quote_char='"' if layout.quoted else False,
            ignore_empty_lines=False,
            invalid_row_handler=skip,
        ),
        csv.ConvertOptions(
            column_types={name: pa.string() for name in names},
            strings_can_be_null=True,
            null_values=[""],
            check_utf8=False,  # the lines were checked
        ),
    )


def _delimiters(line: str, layout: Layout) -> dict[str, int]:
    """Delimiters other than the layout's that part ``line``, and into how many columns."""
    return {d: line.count(d) + 1 for d in _NAMES if d != layout.delimiter and d in line}


def _wrong_delimiter(path: Path, layout: Layout, expected: int, line: str) -> DataError:
    given = _NAMES.get(layout.delimiter, repr(layout.delimiter))
    others = [f"{_NAMES[d]} parts it into {n}" for d, n in _delimiters(line, layout).items()]
    hint = f"; {', '.join(others)}" if others else ""
    return DataError(
        f"the first line has {line.count(layout.delimiter) + 1} columns parted by {given}, expected {expected}{hint}",
        where=str(path),
        fix="give a file of this format, or the delimiter it uses",
    )
