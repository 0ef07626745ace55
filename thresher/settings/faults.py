"""The faults that pydantic finds, as sentences about the keys that a user wrote."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from thresher.errors import nearest
from thresher.settings.annotations import keys_at, tags_at
from thresher.settings.yaml_text import Keys

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "model": "keys",
    "dict": "keys",
}
"""What is expected, by the first word of pydantic's error types such as ``int_parsing`` and ``finite_number``."""

CURES = {
    "text": "put quotes around it",
    "keys": "write 'key: value' lines below it, indented",
    "a list": "write it as [a, b]",
}

BOUNDS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}

TOO_SHORT = "has too few entries"


@dataclass(frozen=True)
class Fault:
    """What is wrong with the value at ``keys``, and how to mend it; both without a full stop."""

    keys: Keys
    what: str
    fix: str


def of_validation(kind: type[BaseModel], error: ValidationError, values: object) -> list[Fault]:
    """The faults of a failed validation, unknown keys first, one for each place.

    Args:
        kind: the class that was to be built.
        values: the plain values it was to be built from.
    """
    details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    faults: dict[Keys, Fault] = {}
    for detail in details:
        fault = _fault(kind, detail, values)
        faults.setdefault(fault.keys, fault)
    return [fault for fault in faults.values() if not _repeats(fault, faults)]


def _repeats(fault: Fault, faults: Collection[Keys]) -> bool:
    """Pydantic leaves faulty entries out and then finds the list too short: the entry's fault says enough."""
    deeper = len(fault.keys)
    return fault.what.startswith(TOO_SHORT) and any(k[:deeper] == fault.keys and len(k) > deeper for k in faults)


def booleans_taken_as_numbers(given: object, built: object, keys: Keys = ()) -> list[Fault]:
    """``true`` and ``false`` where a number is expected, which pydantic takes for 1 and 0."""
    if isinstance(given, bool) and isinstance(built, int | float) and not isinstance(built, bool):
        return [Fault(keys, f"expects a number, got {_shown(given)}", "write a number")]
    pairs: list[tuple[Any, object, object]] = []
    if isinstance(given, Mapping):
        fields = built if isinstance(built, Mapping) else vars(built) if isinstance(built, BaseModel) else {}
        pairs = [(key, value, fields.get(key)) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(built, list | tuple):
        pairs = [(index, *pair) for index, pair in enumerate(zip(given, built, strict=False))]
    return [f for key, value, made in pairs for f in booleans_taken_as_numbers(value, made, (*keys, key))]


def _fault(kind: type[BaseModel], detail: ErrorDetails, values: object) -> Fault:
    loc, sort = detail["loc"], detail["type"]
    keys = _given_keys(loc, values)
    if sort == "missing" and isinstance(loc[-1], int):
        return Fault(keys, f"{TOO_SHORT}: entry {loc[-1] + 1} is absent", "add it")
    if sort == "missing":
        return Fault((*keys, loc[-1]), "required key is absent", f"add '{loc[-1]}'")
    if sort == "extra_forbidden":
        return Fault(keys, "unknown key", nearest(str(loc[-1]), keys_at(kind, loc[:-1])))
    if sort in ("union_tag_not_found", "union_tag_invalid"):
        return _tag_fault(kind, detail, keys)
    what, fix = _sentence(detail)
    return Fault(keys, what, fix)


def _tag_fault(kind: type[BaseModel], detail: ErrorDetails, keys: Keys) -> Fault:
    key = detail["ctx"]["discriminator"].strip("'")
    tags = tags_at(kind, detail["loc"], key)
    if detail["type"] == "union_tag_not_found":
        return Fault((*keys, key), "required key is absent", f"add '{key}', one of: {', '.join(tags)}")
    tag = f"{detail['ctx']['tag']:.80}"
    return Fault((*keys, key), f"'{tag}' is not known", nearest(tag, tags))


def _given_keys(loc: tuple[int | str, ...], values: Any) -> Keys:
    """``loc`` without what pydantic adds to it: tags of unions, names of types, ``[key]``."""
    keys: list[int | str] = []
    for part in loc:
        if _holds(values, part):
            keys.append(part)
            values = values[part]
    return tuple(keys)


def _holds(values: object, part: int | str) -> bool:
    if isinstance(values, Mapping):
        return part in values
    return isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)


def _sentence(detail: ErrorDetails) -> tuple[str, str]:
    sort, context, given = detail["type"], detail.get("ctx", {}), _shown(detail["input"])
    if sort in ("literal_error", "enum"):
        name = f"{detail['input']!s:.80}"
        return f"'{name}' is not known", nearest(name, re.findall(r"'([^']*)'", context["expected"]))
    if sort == "value_error":
        what, _, fix = detail["msg"].removeprefix("Value error, ").partition("; ")
        return what, fix or "correct the value"
    if sort in BOUNDS:
        bound = BOUNDS[sort].format(**{name: _plain(value) for name, value in context.items()})
        return f"must be {bound}, got {given}", f"choose a value that is {bound}"
    if sort == "too_short":
        return f"{TOO_SHORT}: needs at least {context['min_length']}, got {given}", "add one"
    if sort == "string_pattern_mismatch":
        return f"{given} does not fit the pattern {context['pattern']}", "use letters, digits and underscores"
    expected = EXPECTED.get(sort.partition("_")[0])
    if expected == "text" and detail["input"] is None:
        return "expects text, got nothing", "write '\"\"', both kinds of quotes in a shell, for an empty one"
    if expected:
        return f"expects {expected}, got {given}", CURES.get(expected, f"write {expected}")
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, got {given}", "correct the value"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"keys ({', '.join(map(str, value)):.80})"
    return f"{value!r:.80}"


def _plain(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value
