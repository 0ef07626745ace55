"""Frozen settings, and how plain values become settings."""

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from thresher.errors import ConfigError
from thresher.settings.faults import Fault, booleans_taken_as_numbers, of_validation
from thresher.settings.yaml_text import Keys, dotted, line_of

TOLD = 5
"""Faults listed in one message."""


class Settings(BaseModel):
    """Frozen; unknown keys are refused; defaults are validated; numbers are finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


S = TypeVar("S", bound=BaseModel)


def parse(kind: type[S], values: object, source: str, overridden: Collection[Keys] = ()) -> S:
    """Builds ``kind`` from plain values.

    Args:
        values: what a YAML file holds.
        source: where the values come from; starts every message. Where it is a YAML file, messages name the line.
        overridden: paths of keys that came from the command line and not from ``source``.

    Raises:
        ConfigError: names the key, the value given and what is allowed (the nearest key for an unknown one). Up to
            five faults are told, unknown keys first.
    """
    try:
        built = TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise _told(of_validation(kind, error, values), source, overridden) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=source, fix="remove the repeated nesting") from None
    taken = booleans_taken_as_numbers(values, built)
    if taken:
        raise _told(taken, source, overridden)
    return built


def _told(faults: list[Fault], source: str, overridden: Collection[Keys]) -> ConfigError:
    first = faults[0]
    if len(faults) == 1:
        return ConfigError(first.what, where=_place(first, source, overridden), fix=first.fix)
    lines = [f"\n  {_place(fault, source, overridden)}: {fault.what}; {fault.fix}" for fault in faults[:TOLD]]
    rest = f"\n  and {len(faults) - TOLD} more" if len(faults) > TOLD else ""
    return ConfigError(f"{len(faults)} faults{''.join(lines)}{rest}", where=source)


def _place(fault: Fault, source: str, overridden: Collection[Keys]) -> str:
    path = dotted(fault.keys)
    if any(fault.keys[: len(keys)] == keys for keys in overridden):
        return f"override {path}"
    # An absent key has no line: its section has.
    line = next((n for n in (line_of(Path(source), keys) for keys in (fault.keys, fault.keys[:-1])) if n), 0)
    where = f"{source}:{line}" if line else source
    return f"{where}: {path}" if path else where
