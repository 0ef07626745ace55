"""The prepared data set on disk: Parquet files of encoded rows, and ``dataset.json`` that says what they are.

folder/
    dataset.json                    the manifest; written last, so a folder without it was never finished
    train/part-00000.parquet ...    rows of the split ``train``, in order
    valid/part-00000.parquet ...
"""

import json
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ConfigDict, Field

from thresher.data.schema import Schema
from thresher.errors import ConfigError, DataError, nearest
from thresher.settings import Settings, parse

FORMAT = 1
MANIFEST = "dataset.json"
AGAIN = "run 'thresher data prepare' again, into an empty folder"


class Part(Settings):
    """One Parquet file.

    Attributes:
        path: relative to the data set's folder.
        rows: rows in the file.
        groups: rows of each row group, in order.
        size_bytes: length of the file.
        xxh3_128: hash of the file, hexadecimal.
    """

    path: str
    rows: int
    groups: tuple[int, ...]
    size_bytes: int
    xxh3_128: str


class Manifest(Settings):
    """What ``dataset.json`` holds.

    Attributes:
        format: version of this layout.
        columns: the schema; under the key ``schema`` in the file.
        recipe: the recipe that made the data set.
        options: the options given to it.
        splits: the files of each split, in the order of their rows.
        facts: what the recipe found out (counts, dropped rows, sources), for people and reports.
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    format: int = FORMAT
    columns: Schema = Field(alias="schema")
    recipe: str
    options: dict[str, Any]
    splits: dict[str, tuple[Part, ...]]
    facts: dict[str, Any]


class Split:
    """The files of one split, in the order of their rows."""

    def __init__(self, folder: Path, name: str, parts: tuple[Part, ...]) -> None:
        self.folder, self.name, self.parts = folder, name, parts

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(part.rows for part in self.parts)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the order of their rows."""
        return tuple(self.folder / part.path for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """Hash of the split's bytes and row groups (32 hex digits): equal for equal rows in equal order."""
        text = "\n".join(f"{part.xxh3_128} {part.groups}" for part in self.parts)
        return xxhash.xxh3_128_hexdigest(text.encode())


class Dataset:
    """A prepared data set; open one with :meth:`open`, make one with :class:`DatasetWriter`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Reads the manifest and checks that every file is there with its size; rows are read by ``Reader``.

        Raises:
            DataError: the folder, the manifest or a file is missing, unreadable, or not what the manifest says.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError("no such folder", where=str(folder), fix="run 'thresher data prepare RECIPE --out' first")
        dataset = cls(folder, _read_manifest(folder / MANIFEST))
        for parts in dataset.manifest.splits.values():
            for part in parts:
                _check_part(folder, part)
        return dataset

    @property
    def schema(self) -> Schema:
        """Which columns the rows have."""
        return self.manifest.columns

    def split(self, name: str) -> Split:
        """The split called ``name``.

        Raises:
            DataError: there is none; the message names the nearest.
        """
        parts = self.manifest.splits.get(name)
        if parts is None:
            raise DataError(f"no split '{name}'", where=str(self.folder), fix=nearest(name, self.manifest.splits))
        return Split(self.folder, name, parts)

    def fingerprint(self, split: str) -> str:
        """Hash of a split's bytes (32 hex digits); a saved cursor is valid for data of the same fingerprint.

        Raises:
            DataError: there is no such split.
        """
        return self.split(split).fingerprint

    def verify(self) -> None:
        """Reads every byte and compares it with the manifest.

        Raises:
            DataError: names the first file that changed since it was written.
        """
        for parts in self.manifest.splits.values():
            for part in parts:
                if hash_file(self.folder / part.path) != part.xxh3_128:
                    raise DataError("the bytes changed since they were written", where=part.path, fix=AGAIN)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix=AGAIN) from None
    return digest.hexdigest()


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"holds no {MANIFEST}: this is no prepared data set, or its preparation did not finish",
            where=str(path.parent),
            fix=AGAIN,
        ) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix="check the permissions") from None
    except ValueError as error:
        raise DataError(f"is no JSON: {error}", where=str(path), fix=AGAIN) from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise DataError(f"has format {found!r}, this version reads {FORMAT}", where=str(path), fix=AGAIN)
    try:
        return parse(Manifest, values, str(path))
    except ConfigError as error:
        raise DataError(error.what, where=error.where, fix=AGAIN) from None


def _check_part(folder: Path, part: Part) -> None:
    path = folder / part.path
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), fix=AGAIN) from None
    if size != part.size_bytes:
        raise DataError(f"has {size} bytes, the manifest says {part.size_bytes}", where=str(path), fix=AGAIN)
    if sum(part.groups) != part.rows:
        raise DataError(
            f"the manifest gives {part.rows} rows, but its row groups sum to {sum(part.groups)}",
            where=str(path),
            fix=AGAIN,
        )
