"""Everything that happens in a run, on disk: ``metrics.jsonl`` and ``facts.json``."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thresher.errors import DataError
from thresher.trainer.callbacks.base import (
    Callback,
    EndRecord,
    EvalRecord,
    FieldRecord,
    RunFacts,
    SaveRecord,
    StepRecord,
    TableRecord,
)
from thresher.trainer.report.files import METRICS, Facts, read_records, to_line, write_atomically, write_facts


class Records(Callback):
    """Appends a line per record to ``metrics.jsonl`` and closes it each time: a kill leaves at most a torn line.

    On resuming at step s, records of steps after s are cut first: those steps are about to happen again, and the curve
    must not be doubled. A fresh run (resumed step 0) starts an empty file.

    Args:
        folder: the run directory.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = folder / METRICS, clock

    def on_start(self, facts: RunFacts) -> None:
        resumed = facts.resumed_step
        kept = [r for r in read_records(self._path.parent) if resumed and r["step"] <= resumed]
        write_atomically(self._path, "".join(to_line(record) for record in kept))
        write_facts(self._path.parent, facts_of(facts))
        self._write("start", step=resumed, world=facts.world, device=facts.device)

    def on_step(self, record: StepRecord) -> None:
        self._write("train", **asdict(record))

    def on_tables(self, record: TableRecord) -> None:
        self._write("tables", **asdict(record))

    def on_fields(self, record: FieldRecord) -> None:
        self._write("fields", **asdict(record))

    def on_eval(self, record: EvalRecord) -> None:
        self._write("eval", **asdict(record))

    def on_save(self, record: SaveRecord) -> None:
        self._write("save", **asdict(record))

    def on_end(self, record: EndRecord) -> None:
        self._write("end", **asdict(record))

    def _write(self, kind: str, **values: Any) -> None:
        whole = self._path.stat().st_size
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_line({"kind": kind, "time": round(self._clock(), 3)} | values))
        except OSError as error:
            # Half a line would spoil the one that comes after it.
            with suppress(OSError):
                os.truncate(self._path, whole)
            fix = "make room there; the run goes on from its last checkpoint when it is started again"
            raise DataError(f"cannot be written: {error.strerror}", where=str(self._path), fix=fix) from None


def facts_of(facts: RunFacts) -> Facts:
    """What ``facts.json`` holds."""
    return Facts(
        name=facts.config.name,
        model=facts.config.model.name,
        recipe=facts.config.data.recipe,
        columns=facts.schema,
        data=facts.data_facts,
        versions=facts.versions,
        world=facts.world,
        device=facts.device,
        dense_parameters=facts.dense_parameters,
        total_steps=facts.total_steps,
        resumed_step=facts.resumed_step,
    )
