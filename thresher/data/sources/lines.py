"""Text files as a stream of lines with their numbers; lines that cannot be text are set aside.

A line number counts every ``\\n`` of the file, so it is what an editor shows: blank lines count (and are skipped).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thresher.data.quarantine import BadRow
from thresher.errors import DataError

BLOCK_BYTES = 8 << 20
MAX_LINES = 65_536
_LONGEST_LINE_BYTES = 256 << 20
_NEWLINE, _RETURN = 10, 13
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Lines:
    """Consecutive lines of a file, those set aside left out.

    Attributes:
        block: the lines, each with its end, UTF-8.
        numbers: [n] int64, their numbers, counted from 1.
        bad: lines that were set aside.
    """

    block: bytes
    numbers: NDArray[np.int64]
    bad: tuple[BadRow, ...] = ()

    def array(self) -> pa.Array:
        """[n] binary, each line with its end."""
        return _array(self.block)

    def texts(self) -> pa.Array:
        """[n] strings, the lines without white space around them."""
        return pc.utf8_trim_whitespace(self.array().cast(pa.string()))

    def first(self) -> str:
        """The first line as it stands, without its end."""
        return self.block[: self.block.index(b"\n")].decode("utf-8", "backslashreplace").removesuffix("\r")

    def take(self, keep: NDArray[np.bool_]) -> "Lines":
        """The lines that ``keep`` ([n]) marks."""
        kept = self.array().filter(pa.array(keep))
        return replace(self, block=b"".join(kept.to_pylist()), numbers=self.numbers[keep])

    def as_bad(self, file: str, reason: str) -> tuple[BadRow, ...]:
        """All of these lines as bad rows."""
        texts = [line.decode("utf-8", "backslashreplace").rstrip("\r\n") for line in self.array().to_pylist()]
        return tuple(BadRow(file, int(n), reason, t) for n, t in zip(self.numbers, texts, strict=True))


def read_lines(path: Path, encoding: str = "utf-8", quote: bytes = b"", skip: int = 0) -> Iterator[Lines]:
    """Lines of a text file, plain or compressed (gzip by content; bz2, zst, lz4 by suffix), at most 65,536 at a time.

    Set aside as bad: lines that ``encoding`` cannot decode, with a carriage return inside, or with an odd number of
    ``quote`` characters. Blank lines are skipped.

    Args:
        encoding: ``utf-8`` or ``latin-1``.
        skip: lines to skip at the start, such as a header.

    Raises:
        DataError: the file is missing, unreadable, empty, damaged (a truncated gzip), or has no line ends.
    """
    number = 1
    for block in _pieces(_blocks(path)):
        ends = _ends(block)
        drop = min(max(skip + 1 - number, 0), len(ends))
        if drop:
            block = block[ends[drop - 1] :]
        count = len(ends) - drop
        numbers = np.arange(number + drop, number + drop + count, dtype=np.int64)
        number += len(ends)
        if count:
            yield _screened(Lines(_recoded(block, encoding), numbers), str(path), quote)


def first_line(path: Path, encoding: str = "utf-8") -> str:
    """The first line that is not blank, without its end.

    Raises:
        DataError: as for :func:`read_lines`, or there is none.
    """
    for lines in read_lines(path, encoding):
        if len(lines.numbers) or lines.bad:
            bad_first = lines.bad and (not len(lines.numbers) or lines.bad[0].row < lines.numbers[0])
            return lines.bad[0].raw if bad_first else lines.first()
    raise DataError("holds no rows, only blank lines", where=str(path), fix="give a file with rows")


def _blocks(path: Path) -> Iterator[bytes]:
    """Blocks of whole lines; the last line gets an end if it has none."""
    rest = b""
    try:
        with open_bytes(path) as stream:
            while data := stream.read(BLOCK_BYTES):
                cut = data.rfind(b"\n") + 1
                if cut:
                    yield rest + data[:cut]
                rest = data[cut:] if cut else rest + data
                if len(rest) > _LONGEST_LINE_BYTES:
                    raise DataError("has no line end for 256 MiB", where=str(path), fix="give a text file")
    except OSError as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="replace the damaged file") from None
    if rest:
        yield rest + b"\n"


def open_bytes(path: Path) -> pa.NativeFile:
    """The bytes of a file as a stream, decompressed: gzip by content; bz2, zst, lz4 by suffix.

    Raises:
        DataError: the file is missing, empty, or cannot be read.
    """
    if not path.is_file():
        fault = "is a folder, not a file" if path.is_dir() else "no such file"
        raise DataError(fault, where=str(path), fix="give an existing file")
    try:
        with path.open("rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="make it readable") from None
    if not magic:
        raise DataError("is empty", where=str(path), fix="give a file with rows")
    return pa.input_stream(str(path), compression="gzip" if magic == _GZIP_MAGIC else "detect")


def _pieces(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks of at most ``MAX_LINES`` lines, without a byte order mark at the start."""
    mark = b"\xef\xbb\xbf"
    for block in blocks:
        block, mark = block.removeprefix(mark) if mark else block, b""
        cuts = [0, *_ends(block)[MAX_LINES - 1 :: MAX_LINES].tolist(), len(block)]
        yield from (block[a:b] for a, b in pairwise(cuts) if b > a)


def _ends(block: bytes) -> NDArray[np.int64]:
    """[n] positions just behind each line end."""
    return np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE) + 1


def _array(block: bytes) -> pa.Array:
    offsets = np.concatenate([[0], _ends(block)]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(block)])


def _recoded(block: bytes, encoding: str) -> bytes:
    return block if encoding == "utf-8" else block.decode(encoding).encode()


def _screened(lines: Lines, file: str, quote: bytes) -> Lines:
    reasons = np.zeros(len(lines.numbers), np.uint8)
    for code, (marked, _) in enumerate(_CHECKS, start=2):
        reasons[marked(lines.block, quote)] = code
    reasons[_blank(lines.block)] = 1
    if not reasons.any():
        return lines
    bad = [
        row
        for code, (_, reason) in enumerate(_CHECKS, start=2)
        for row in lines.take(reasons == code).as_bad(file, reason)
    ]
    return replace(lines.take(reasons == 0), bad=tuple(sorted(bad, key=lambda row: row.row)))


def _blank(block: bytes) -> NDArray[np.int64]:
    """Indices of lines without a character."""
    ends = _ends(block)
    lengths = np.diff(ends, prepend=0)
    before = np.frombuffer(block, np.uint8)[np.maximum(ends - 2, 0)]
    return np.flatnonzero((lengths == 1) | ((lengths == 2) & (before == _RETURN)))


def _undecodable(block: bytes, _quote: bytes) -> list[int]:
    try:
        block.decode()
        return []
    except UnicodeDecodeError:
        return [i for i, line in enumerate(block.split(b"\n")[:-1]) if not _is_utf8(line)]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _torn(block: bytes, _quote: bytes) -> list[int]:
    """Indices of lines with a carriage return inside, which some readers take for a line end."""
    if b"\r" not in block or block.count(b"\r") == block.count(b"\r\n"):
        return []
    return [i for i, line in enumerate(block.split(b"\n")[:-1]) if b"\r" in line.removesuffix(b"\r")]


def _unbalanced(block: bytes, quote: bytes) -> list[int]:
    """Indices of lines with an odd number of quotes: a parser would swallow the lines behind such a one."""
    if not quote or quote not in block:
        return []
    at = np.flatnonzero(np.frombuffer(block, np.uint8) == quote[0])
    ends = _ends(block)
    per_line = np.bincount(np.searchsorted(ends, at, side="right"), minlength=len(ends))
    return np.flatnonzero(per_line % 2).tolist()


_CHECKS = (
    (_undecodable, "line: holds bytes that are not text in UTF-8"),
    (_torn, "line: holds a carriage return"),
    (_unbalanced, "line: a quote is not closed on it"),
)
