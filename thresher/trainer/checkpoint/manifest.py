"""``MANIFEST.json``: what a checkpoint consists of. A folder without a manifest that holds is no checkpoint.

    {"checksum": ..., "facts": {...}, "files": {"__0_0.distcp": {"size_bytes": ..., "xxh3_128": ...}, ...},
     "format": 1, "save_id": ..., "step": ..., "world": ...}

There is one way to write a manifest down (sorted keys, fixed spacing), and only that way is accepted, so that no byte
of the file can change unnoticed, be it inside a value or between two. Undefined metrics among the facts are written as
Python writes them (``NaN``): losing a checkpoint over one would be worse than leaving the letter of JSON.
"""

import json
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import Field, ValidationError

from thresher.errors import CheckpointError
from thresher.settings import Settings

MANIFEST = "MANIFEST.json"


class FileRecord(Settings):
    """Length and xxh3-128 digest (32 hexadecimal digits) of one file."""

    size_bytes: int = Field(ge=0)
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")


class Manifest(Settings):
    """One checkpoint.

    Attributes:
        save_id: differs between any two saves.
        step: optimizer steps that the state has seen; the folder's name says the same.
        world: number of ranks that wrote it.
        facts: what the caller saved beside the tensors.
        files: every file of the folder but the manifest.
    """

    format: Literal[1] = 1
    save_id: str
    step: int = Field(ge=0)
    world: int = Field(ge=1)
    facts: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.size_bytes for record in self.files.values())

    def encoded(self) -> bytes:
        """The only accepted content of the file.

        Raises:
            TypeError: ``facts`` holds something that is not JSON.
        """
        content = self.model_dump()
        return _canonical({**content, "checksum": xxhash.xxh3_128_hexdigest(_canonical(content))})


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder ``path``.

    Raises:
        CheckpointError: the file is missing, unreadable, or not exactly what was written.
    """
    file = path / MANIFEST
    try:
        data = file.read_bytes()
        content = json.loads(data)
        checksum = content.pop("checksum")
        manifest = Manifest.model_validate(content)
        whole = manifest.encoded() == data
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(file)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
        raise CheckpointError("is not a manifest", where=str(file)) from None
    if not whole:
        raise CheckpointError(f"differs from what was written (checksum {checksum!s:.40})", where=str(file))
    return manifest


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
