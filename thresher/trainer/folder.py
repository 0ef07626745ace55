"""The run directory: what stands where, and whether an existing one may be continued.

::

    runs/<name>/
      config.yaml      the configuration, defaults included
      plan.json        the sharding plan in force
      facts.json       data, versions, devices
      metrics.jsonl    every record
      checkpoints/     step-00001200/ ... (and best/ with early stopping)
      tensorboard/     event files
      logs/            output of ranks other than 0
      quarantine/      rows that were left out, by rank, where the configuration tolerates bad rows
      report.html
      .lock            which process trains here
"""

import os
from pathlib import Path
from typing import Any

import yaml

from thresher.errors import ConfigError
from thresher.settings import read_yaml
from thresher.trainer.config import RunConfig

FREE = (
    "run_dir",
    "launch",
    "checkpoint",
    "eval",
    "tensorboard",
    "train.epochs",
    "train.max_steps",
    "train.log_every",
    "data.path",
    "data.recipe",
    "data.options",
    "data.prefetch",
    "data.max_bad_share",
    "sharding",
    "pipeline",
    "tiers.storage.ram_gb",
)
"""Settings that may differ when a run is continued: they do not change what a step computes (the data themselves are
compared by fingerprint, and a change of the number of steps is what continuing is for)."""


class RunFolder:
    """Paths inside one run directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.plan = root / "plan.json"
        self.checkpoints = root / "checkpoints"
        self.best = root / "checkpoints" / "best"
        self.tensorboard = root / "tensorboard"
        self.logs = root / "logs"

    def create(self) -> None:
        """Makes the folders.

        Raises:
            ConfigError: the path is a file, or cannot be written.
        """
        try:
            for folder in (self.root, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot be made a run directory: {error.strerror or error}",
                where=str(self.root),
                fix="set run_dir to a folder that can be written",
            ) from None

    def quarantine(self, rank: int) -> Path:
        """Folder in which a rank lists the rows it left out."""
        return self.root / "quarantine" / f"rank-{rank}"

    def write_config(self, config: RunConfig[Any]) -> None:
        """Saves the configuration with all defaults; a kill or a power cut leaves the old file or the new one."""
        partial = self.config.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            yaml.safe_dump(config.model_dump(mode="json"), file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.config)

    def require_same(self, config: RunConfig[Any]) -> None:
        """Refuses to continue a run whose steps would not be those of ``config``.

        Raises:
            ConfigError: names the settings that differ, the run's value and the new one.
        """
        if not self.config.exists():
            return
        old, new = flat(read_yaml(self.config)), flat(config.model_dump(mode="json"))
        differ = [key for key in sorted(old | new) if old.get(key) != new.get(key) and not _free(key)]
        if differ:
            told = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differ[:5])
            raise ConfigError(
                f"this run was started with other settings: {told}",
                where=str(self.config),
                fix="put them back to go on with this run, or set another run_dir (or name)",
            )


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted keys; lists count as values.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)
