"""YAML, read strictly: duplicate keys are refused, and every fault names its line."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from thresher.errors import ConfigError, nearest

Keys = tuple[Hashable, ...]
"""The way to a value inside nested mappings and lists: ``("features", 0, "table")``."""


def dotted(keys: Keys) -> str:
    """The way as a user writes it.

    >>> dotted(("features", 0, "table"))
    'features[0].table'
    """
    parts = [f"[{key}]" if isinstance(key, int) and index else f".{key}" for index, key in enumerate(keys)]
    return "".join(parts).removeprefix(".")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a mapping that holds one key twice, where YAML libraries keep the last silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key '{key.value}' stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds.

    Args:
        where: what a message calls the text, a file name for instance.

    Raises:
        ConfigError: no YAML, a key given twice, nested too deeply; with line and column where known.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ConfigError(problem, where=place, fix=_cure(problem)) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=where, fix="remove the repeated brackets") from None
    except ValueError as error:  # a date that does not exist
        raise ConfigError(f"not YAML: {error}", where=where, fix="put quotes around the value") from None


def _cure(problem: str) -> str:
    if "\\t" in problem:
        return "indent with spaces, YAML allows no tabs"
    if "twice" in problem:
        return "remove one of the two"
    return "check indentation, colons and quotes there"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: the file is missing, unreadable, no YAML, or no mapping; with line and column where known.
    """
    values = parse_yaml(_text_of(path), str(path))
    if values is None:
        raise ConfigError("is empty", where=str(path), fix="write 'key: value' lines")
    if not isinstance(values, dict):
        raise ConfigError(f"holds a {_kind(values)}, not keys", where=str(path), fix="write 'key: value' lines")
    return values


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        fix = nearest(path.name, siblings) if siblings else "give the path of an existing YAML file"
        raise ConfigError("no such file", where=str(path), fix=fix) from None
    except IsADirectoryError:
        inside = sorted(p.name for p in path.glob("*.y*ml"))
        fix = f"give a file in it: {', '.join(inside)}" if inside else "give a YAML file"
        raise ConfigError("is a folder, not a file", where=str(path), fix=fix) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", where=str(path), fix="give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path), fix="give a readable file") from None


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "single value"


def line_of(path: Path, keys: Keys) -> int:
    """The line, counted from 1, on which the value at ``keys`` stands in a YAML file; 0 where it does not."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return 0
    line = 0
    for key in keys:
        node, line = _step(node, key)
        if node is None:
            return 0
    return line


def _step(node: yaml.Node | None, key: Hashable) -> tuple[yaml.Node | None, int]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return value, name.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key], node.value[key].start_mark.line + 1
    return None, 0
