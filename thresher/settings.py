"""The base of every configuration class, and the translation of its failures into located, helpful errors."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from thresher.errors import ConfigError, nearest


class Settings(BaseModel):
    """Frozen; unknown keys are refused; defaults are validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


S = TypeVar("S", bound=BaseModel)


def parse(kind: type[S], values: object, source: str) -> S:
    """Builds ``kind`` from plain values.

    Args:
        values: what a YAML file holds.
        source: where the values come from; starts every message.

    Raises:
        ConfigError: names the key, the value given and what is allowed (the nearest key for an unknown one).
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise _located(kind, error, source) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: the file is missing, unreadable, no YAML, or no mapping; with line and column where known.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(
            "no such file", where=str(path), fix=nearest(path.name, siblings) if siblings else "give an existing file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), fix="give a readable UTF-8 YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(problem, where=place, fix="check indentation, colons and quotes there") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"holds {type(values).__name__}, not a mapping", where=str(path), fix="write 'key: value' lines"
        )
    return values


def _located(kind: type[BaseModel], error: ValidationError, source: str) -> ConfigError:
    first, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = first["loc"]
    path = ".".join(str(part) for part in loc)
    more = f" (and {len(others)} more)" if others else ""
    where = f"{source}: {path}" if path else source
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key{more}", where=where, fix=nearest(str(loc[-1]), _keys_at(kind, loc[:-1])))
    if first["type"] == "missing":
        return ConfigError(f"required key is absent{more}", where=where, fix=f"add '{loc[-1]}'")
    if first["type"] in ("union_tag_invalid", "literal_error", "enum"):
        context = first.get("ctx", {})
        allowed = str(context.get("expected_tags") or context.get("expected", "")).replace(" or ", ", ")
        names = [name.strip(" '\"") for name in allowed.split(",")]
        given = str(context.get("tag", first["input"]))
        return ConfigError(f"'{given}' is not known{more}", where=where, fix=nearest(given, names))
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f", got {first['input']!r:.200}"
    return ConfigError(f"{message}{given}{more}", where=where, fix="correct the value")


def _keys_at(kind: object, loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at ``loc``, found by walking the annotations; union tags appear in ``loc`` as names."""
    if not loc:
        return [key for model in _models(kind) for key in model.model_fields]
    head, rest = loc[0], loc[1:]
    found: list[str] = []
    for model in _models(kind):
        field = model.model_fields.get(str(head))
        if field is not None:
            found += _keys_at(field.annotation, rest)
        elif isinstance(head, int) or _is_tag(model, head):
            found += _keys_at(model, rest)
    if not found and get_origin(kind) in (dict, list, tuple):
        found = _keys_at(get_args(kind)[-1], rest) or _keys_at(get_args(kind)[0], rest)
    return found


def _is_tag(model: type[BaseModel], head: str) -> bool:
    return any(head in get_args(field.annotation) for field in model.model_fields.values())


def _models(kind: object) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    if get_origin(kind) in (Union, UnionType, Annotated, list, tuple, dict):
        return [model for part in get_args(kind) for model in _models(part)]
    return []
