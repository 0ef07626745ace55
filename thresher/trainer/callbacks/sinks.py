"""Scalars of a run for a tracking service. TensorBoard is one; others need only the three methods of :class:`Sink`."""

import math
from dataclasses import asdict
from typing import Protocol

from thresher.trainer.callbacks.base import Callback, EndRecord, EvalRecord, RunFacts, StepRecord


class Sink(Protocol):
    """Where scalars go."""

    def start(self, facts: RunFacts) -> None:
        """Opens the run; it may have existed before, and goes on after step ``facts.resumed_step``."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Takes finite values by name: ``train/loss``, ``eval/valid/auc``."""

    def end(self, record: EndRecord) -> None:
        """Closes the run."""


class Forward(Callback):
    """Hands train and evaluation records to a sink as scalars; values that are not finite are left out."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def on_start(self, facts: RunFacts) -> None:
        self._sink.start(facts)

    def on_step(self, record: StepRecord) -> None:
        values = asdict(record)
        self._send(values.pop("step"), "train", values)

    def on_eval(self, record: EvalRecord) -> None:
        self._send(record.step, f"eval/{record.split}", record.metrics)

    def on_end(self, record: EndRecord) -> None:
        self._sink.end(record)

    def _send(self, step: int, prefix: str, values: dict[str, float]) -> None:
        finite = {f"{prefix}/{name}": float(value) for name, value in values.items() if math.isfinite(value)}
        self._sink.scalars(step, finite)
