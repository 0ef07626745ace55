"""What the kernels' library is built from, for the build and for the loader, which must not meet a stale one."""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = "kernels.so"
PER_INSTRUCTIONS = ("lookup.cpp", "maintain.cpp", "update.cpp")
"""Compiled once for each instruction set; other files once."""


def sources(folder: Path = FOLDER) -> list[Path]:
    """All C++ files and headers."""
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def digest(folder: Path = FOLDER) -> str:
    """Of names and contents of all C++ files and headers."""
    total = hashlib.blake2b(digest_size=16)
    for path in sources(folder):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
