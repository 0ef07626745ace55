"""A piece of bad input: how to make it, and what its user is to be told."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from thresher.errors import ThresherError


@dataclass(frozen=True)
class Case:
    """One piece of bad input.

    Attributes:
        id: names the case.
        act: makes the input in an empty folder and uses it; raises.
        error: the class raised.
        told: pieces of the message: the place and the cure among them.
    """

    id: str
    act: Callable[[Path], object]
    error: type[ThresherError]
    told: tuple[str, ...]


CONFIG: dict[str, Any] = {
    "name": "bad",
    "data": {"path": "data"},
    "model": {"name": "deepfm"},
    "train": {"batch_size": 64},
}


def changed(changes: dict[str, Any], base: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """A copy of ``base`` with dotted keys set; a value of ``...`` removes its key."""
    values = deepcopy(base)
    for path, value in changes.items():
        *way, last = path.split(".")
        inner = values
        for key in way:
            inner = inner.setdefault(key, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return values


def write_yaml(path: Path, values: object) -> Path:
    """Writes ``values`` as YAML, text and bytes as they are."""
    if isinstance(values, bytes):
        path.write_bytes(values)
    else:
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path
