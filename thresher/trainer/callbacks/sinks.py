"""Scalars of a run for a tracking service. TensorBoard is one; others need only the three methods of :class:`Sink`."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from thresher.trainer.callbacks.base import (
    Callback,
    EndRecord,
    EvalRecord,
    FieldRecord,
    RunFacts,
    StepRecord,
    TableRecord,
)

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where scalars go."""

    def start(self, facts: RunFacts) -> None:
        """Opens the run; it may have existed before, and goes on after step ``facts.resumed_step``."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Takes finite values by name: ``train/loss``, ``eval/valid/auc``."""

    def end(self, record: EndRecord) -> None:
        """Closes the run."""


class Forward(Callback):
    """Hands train and evaluation records to a sink as scalars; values that are not finite are left out.

    A sink that fails is left alone from then on, and the log says so: ``metrics.jsonl`` has everything, and neither a
    tracking service nor TensorBoard's event file is worth a run.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._failed = False

    def on_start(self, facts: RunFacts) -> None:
        self._try(lambda: self._sink.start(facts))

    def on_step(self, record: StepRecord) -> None:
        values = asdict(record)
        self._send(values.pop("step"), "train", values)

    def on_tables(self, record: TableRecord) -> None:
        values = asdict(record) | {"share": record.share}
        step, rows, shares = values.pop("step"), values.pop("rows"), values.pop("shares")
        self._send(step, "tables", values)
        self._send(step, "tables/rows", rows)
        self._send(step, "tables/share_of", shares)

    def on_fields(self, record: FieldRecord) -> None:
        if record.event == "scores":
            self._send(record.step, "fields/score", record.scores)
        self._send(record.step, "fields", {"dropped": len(record.dropped), "table_bytes": record.table_bytes})

    def on_eval(self, record: EvalRecord) -> None:
        self._send(record.step, f"eval/{record.split}", record.metrics)

    def on_end(self, record: EndRecord) -> None:
        self._try(lambda: self._sink.end(record))

    def _send(self, step: int, prefix: str, values: dict[str, float]) -> None:
        finite = {f"{prefix}/{name}": float(value) for name, value in values.items() if math.isfinite(value)}
        self._try(lambda: self._sink.scalars(step, finite))

    def _try(self, send: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            send()
        except Exception as error:
            self._failed = True
            name = type(self._sink).__name__
            log.warning("%s gets no more of this run: %s: %s", name, type(error).__name__, error)
