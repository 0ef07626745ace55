"""The base of every configuration class, and how YAML becomes one, with located errors where it does not."""

from thresher.settings.base import Settings, parse
from thresher.settings.overrides import apply_override
from thresher.settings.yaml_text import Keys, parse_yaml, read_yaml

__all__ = ["Keys", "Settings", "apply_override", "parse", "parse_yaml", "read_yaml"]
