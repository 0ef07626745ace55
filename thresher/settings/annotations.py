"""Which keys and tags a class of settings allows at some place, read from its annotations."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

Loc = tuple[int | str, ...]
"""A place as pydantic names it: keys, indices, and the tag of a union where one was chosen."""


def keys_at(kind: object, loc: Loc) -> set[str]:
    """The keys that a mapping at ``loc`` may hold."""
    return {key for model in _models_at(kind, loc) for key in model.model_fields}


def tags_at(kind: object, loc: Loc, key: str) -> list[str]:
    """The values of ``key`` among which a union at ``loc`` chooses, sorted."""
    fields = [model.model_fields[key] for model in _models_at(kind, loc) if key in model.model_fields]
    return sorted({str(tag) for field in fields for tag in get_args(field.annotation)})


def _models_at(kind: object, loc: Loc) -> list[type[BaseModel]]:
    models = _models(kind)
    for part in loc:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models(field.annotation)]
        else:
            models = [model for model in models if _is_tag(model, part)] or models
    return models


def _is_tag(model: type[BaseModel], part: int | str) -> bool:
    return any(part in get_args(field.annotation) for field in model.model_fields.values())


def _models(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    if get_origin(kind) in (Union, UnionType, Annotated, list, tuple, dict):
        return [model for part in get_args(kind) for model in _models(part)]
    return []
