"""Plain text for language models: each file as one row of tokens, cut into windows.

    file     |------------- train -------------|- valid -|- test -|      no window crosses a border
    windows  [0 ..... length]                                            length + 1 tokens each: the last one
                       [stride ..... stride + length]                    is predicted, but no input

With ``stride: 0`` (the default, ``length``) a window begins with the last token of the one before it, so that each
token but the first is predicted once. The last window of a part may be shorter.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from thresher.data.recipes.base import SPLITS, Chunk
from thresher.data.recipes.from_files import FromFiles, Share
from thresher.data.schema import Schema, SequenceFeature, Table
from thresher.data.sources import choose_files, open_bytes
from thresher.errors import DataError

TEXT = "text"
_BLOCK_BYTES = 1 << 20
_CHUNK_TOKENS = 1 << 20
_CHUNK_ROWS = 1 << 16

Tokens = NDArray[np.generic]
"""[n] bytes as uint8, or code points as uint32."""


class Text(FromFiles):
    """Windows of text as one sequence, ``text``. The number of a row is that of its first token in its file, from 1.

    Attributes:
        level: a token is a ``byte`` (256 rows, no vocabulary), or a ``character`` of UTF-8 (a vocabulary).
        length: tokens of a window that are inputs; a row holds one more.
        stride: tokens from one window to the next; 0 for ``length``.
        valid, test: shares of each file, at its end, that are held out.
        table_rows: ``character`` only: upper bound on rows.
        min_count: ``character`` only: rarer characters share the unseen row.
    """

    recipe: ClassVar[str] = "text"
    summary: ClassVar[str] = "plain text by bytes or characters: predict the next one"

    level: Literal["byte", "character"] = "byte"
    length: int = Field(default=1024, ge=1, le=1 << 24)
    stride: int = Field(default=0, ge=0)
    valid: Share = 0.05
    test: Share = 0.05
    table_rows: int = Field(default=10_000, ge=3)
    min_count: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _text_left(self) -> "Text":
        if self.valid + self.test >= 1.0:
            raise ValueError(f"valid + test is {self.valid + self.test:g}, which leaves no text to train on")
        if self.stride > self.length:
            raise ValueError(f"stride {self.stride} is above length {self.length}: text between windows would be lost")
        return self

    def data_schema(self) -> Schema:
        if self.level == "byte":
            table = Table(name="token", rows=256, ids="index")
        else:
            table = Table(name="token", rows=self.table_rows, ids="vocabulary", min_count=self.min_count)
        return Schema(
            name="text",
            tables=(table,),
            features=(SequenceFeature(name=TEXT, table="token", max_length=self.length + 1),),
        )

    def inputs(self) -> tuple[Path, ...]:
        return choose_files(self.source, ("*.txt", "*.txt.gz", "*.md"), "text file")

    def chunks(self) -> Iterator[Chunk]:
        for path in self.inputs():
            total = sum(len(block) for block in self._blocks(path))
            if total < 2:
                raise DataError("holds fewer than two tokens", where=str(path), fix="give a longer text")
            yield from self._windows(path, total)

    def facts(self) -> dict[str, Any]:
        return {"tokens": sum(len(block) for path in self.inputs() for block in self._blocks(path))}

    def _windows(self, path: Path, total: int) -> Iterator[Chunk]:
        tape = _Tape(self._blocks(path))
        borders = [0, round(total * (1 - self.valid - self.test)), round(total * (1 - self.test)), total]
        for split, low, high in zip(SPLITS, borders[:-1], borders[1:], strict=True):
            for starts in _portions(low, high, self.stride or self.length, self.length):
                rows = [(start, min(start + self.length + 1, high)) for start in starts]
                flat = np.concatenate([tape.cut(start, stop) for start, stop in rows])
                lengths = np.array([stop - start for start, stop in rows])
                table = pa.table({TEXT: _lists(flat, lengths)})
                yield Chunk(split, table, str(path), np.array(starts, np.int64) + 1)

    def _blocks(self, path: Path) -> Iterator[Tokens]:
        """The tokens of a file, block by block.

        Raises:
            DataError: it cannot be read, or is no UTF-8 where characters are asked for.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        read = 0
        try:
            with open_bytes(path) as stream:
                while data := stream.read(_BLOCK_BYTES):
                    read += len(data)
                    if self.level == "byte":
                        yield np.frombuffer(data, np.uint8)
                    else:
                        yield np.frombuffer(decoder.decode(data).encode("utf-32-le"), np.uint32)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(
                f"is no text in UTF-8: {error.reason} at byte {read - len(error.object) + error.start}",
                where=str(path),
                fix="use level=byte, or convert the file",
            ) from None
        except OSError as error:
            raise DataError(f"cannot be read: {error}", where=str(path), fix="replace the damaged file") from None


class _Tape:
    """A stream of tokens, of which the part from the newest cut on is in memory."""

    def __init__(self, blocks: Iterator[Tokens]) -> None:
        self._blocks, self._first = blocks, 0
        self._held: Tokens = np.empty(0, np.uint8)

    def cut(self, start: int, stop: int) -> Tokens:
        """Tokens start .. stop - 1; ``start`` never falls."""
        if stop > self._first + len(self._held):
            parts = [self._held[start - self._first :]]
            self._first = start
            while stop > self._first + sum(map(len, parts)):
                parts.append(next(self._blocks))
            self._held = np.concatenate(parts)
        return self._held[start - self._first : stop - self._first]


def _portions(low: int, high: int, stride: int, length: int) -> Iterator[range]:
    """First tokens of the windows of a part, some at a time. The last window is the first that reaches the end."""
    count = max(-(-(high - low - 1 - length) // stride), 0) + 1 if high - low > 1 else 0
    many = max(min(_CHUNK_TOKENS // length, _CHUNK_ROWS), 1)
    for first in range(0, count, many):
        yield range(low + first * stride, low + min(first + many, count) * stride, stride)


def _lists(flat: Tokens, lengths: NDArray[np.int64]) -> pa.LargeListArray:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    if flat.dtype == np.uint8:
        return pa.LargeListArray.from_arrays(offsets, pa.array(flat.astype(np.int64)))
    distinct, codes = np.unique(flat, return_inverse=True)
    characters = pa.array([chr(point) for point in distinct.tolist()], pa.string())
    return pa.LargeListArray.from_arrays(offsets, characters.take(pa.array(codes)))
