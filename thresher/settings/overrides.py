"""Overrides from the command line: ``train.batch_size=1024``."""

from typing import Any

from thresher.errors import ConfigError
from thresher.settings.yaml_text import Keys, parse_yaml


def apply_override(values: dict[str, Any], override: str) -> Keys:
    """Sets one dotted key of ``values`` in place, and returns its path. The value is YAML.

    Raises:
        ConfigError: no ``=``, an empty key, a value that is no YAML, or a path through something that is no mapping.
    """
    key, equals, text = override.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not all([*path, last]):
        raise ConfigError(f"'{override}' is no override", where="command line", fix="write key.path=value")
    value = parse_yaml(text, f"override {key}")
    for part in path:
        inner = values.get(part)
        if not isinstance(inner, dict | None):
            raise ConfigError(f"'{part}' holds a value, not keys", where=f"override {key}", fix="shorten the path")
        # A copy: an anchor may have put the same mapping elsewhere.
        values[part] = dict(inner or {})
        values = values[part]
    values[last] = value
    return (*path, last)
