"""A run directory as a report sees it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.settings import read_yaml
from thresher.sharding.plan import Plan
from thresher.trainer.report.files import CONFIG, Facts, Record, read_facts, read_plan, read_records
from thresher.trainer.state import lower_is_better


@dataclass(frozen=True)
class Run:
    """What the files hold; records of a step that was recorded twice are there once, the newest."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    plan: Plan
    facts: Facts
    records: list[Record]

    @staticmethod
    def read(folder: Path) -> "Run":
        """Reads the run directory ``folder``.

        Raises:
            DataError, ConfigError: a file is missing or broken; names it.
        """
        path = folder / CONFIG
        config = read_yaml(path)
        text = path.read_text(encoding="utf-8")
        return Run(folder, config, text, read_plan(folder), read_facts(folder), read_records(folder))

    def of(self, kind: str) -> list[Record]:
        """Records of one kind."""
        return _newest(r for r in self.records if r["kind"] == kind)

    def evals(self, split: str) -> list[Record]:
        """Evaluations of one split, in the order of steps."""
        return [r for r in self.of("eval") if r["split"] == split]

    @property
    def splits(self) -> list[str]:
        """Evaluated splits, in the order of the first evaluation."""
        return list(dict.fromkeys(r["split"] for r in self.of("eval")))

    @property
    def valid(self) -> str:
        """Name of the validation split; may be empty."""
        return str(self.config.get("data", {}).get("valid", "valid"))

    @property
    def status(self) -> str:
        """``done``, ``early stop``, ``failed``, or ``in progress`` where the newest process has not said."""
        last = next((r for r in reversed(self.records) if r["kind"] in ("start", "end")), None)
        return str(last["status"]) if last and last["kind"] == "end" else "in progress"

    @property
    def metric(self) -> str:
        """The metric that early stopping looks at; the first one measured where that is not measured."""
        wanted = str(self.config.get("eval", {}).get("early_stop", {}).get("metric", "auc"))
        names = [name for r in self.of("eval") for name in r["metrics"]]
        return wanted if wanted in names or not names else names[0]

    @property
    def best(self) -> Record | None:
        """The validation with the best :attr:`metric`; None before the first one that is defined."""
        name = self.metric
        sign = -1.0 if lower_is_better(name) else 1.0
        defined = [r for r in self.evals(self.valid) if not math.isnan(r["metrics"].get(name, math.nan))]
        return max(defined, key=lambda r: sign * r["metrics"][name], default=None)

    @property
    def held_out(self) -> Record | None:
        """The newest evaluation of a split other than the validation split; None where there is none."""
        return next((r for r in reversed(self.of("eval")) if r["split"] != self.valid), None)

    @property
    def seconds(self) -> float:
        """Time spent on the steps, evaluations and saves that count, over all processes that worked on them."""
        return float(sum(r["seconds"] for r in self.records if r["kind"] in ("train", "eval", "save")))


def _newest(records: Iterable[Record]) -> list[Record]:
    """By (split or event, step), start records all."""
    latest = {
        (r["kind"], r.get("split", r.get("event")), r["time"] if r["kind"] == "start" else r["step"]): r
        for r in records
    }
    return list(latest.values())
