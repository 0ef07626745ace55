"""Digests of files: taken while they are written, so that saving reads nothing back, and again before loading."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from thresher.trainer.checkpoint.manifest import FileRecord

_BLOCK_BYTES = 1 << 22


class _HashingStream(io.RawIOBase):
    """Passes writes on to ``stream`` and hashes them. Writing is sequential: there is no ``seek``.

    Attributes:
        failure: the first error of ``stream``. ``torch.save`` hides it behind one of its own that says no reason.
    """

    failure: OSError | None = None

    def __init__(self, stream: io.IOBase) -> None:
        super().__init__()
        self._stream = cast(io.BufferedWriter, stream)
        self._digest = xxhash.xxh3_128()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            self._stream.write(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._digest.update(view)
        self._bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def record(self) -> FileRecord:
        return FileRecord(size_bytes=self._bytes, xxh3_128=self._digest.hexdigest())


class _HashingFileSystem(FileSystem):
    """Keeps a record of every file written through it, by name."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            hashing = _HashingStream(stream)
            try:
                yield hashing
                hashing.flush()
            except RuntimeError as error:
                if hashing.failure is None:
                    raise
                raise hashing.failure from error
        self.records[Path(path).name] = hashing.record

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """DCP's writer of one file a rank, synced to disk; ``records`` has the digests of this rank's files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True, overwrite=False)
        self.fs = self._hashing = _HashingFileSystem()

    @property
    def records(self) -> dict[str, FileRecord]:
        return self._hashing.records


def record_of(path: Path) -> FileRecord:
    """Length and digest of the file ``path`` as it is now.

    Raises:
        OSError: it cannot be read.
    """
    digest, length = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            length += len(block)
    return FileRecord(size_bytes=length, xxh3_128=digest.hexdigest())
