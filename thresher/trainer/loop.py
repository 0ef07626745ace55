"""The one training loop: read, step, and at their times log, evaluate, save, stop."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from thresher.data.batch import Batch
from thresher.errors import CheckpointError
from thresher.trainer.callbacks.base import Callback, EvalRecord, FieldRecord, SaveRecord, TableRecord
from thresher.trainer.config import EvalConfig, TrainConfig
from thresher.trainer.meter import Meter
from thresher.trainer.parts import Steps
from thresher.trainer.rates import Rates
from thresher.trainer.state import TrainState
from thresher.trainer.step import StepResult
from thresher.trainer.world import World

log = logging.getLogger(__name__)


class Validation(Protocol):
    """Measures the validation split."""

    def __call__(self, step: int) -> EvalRecord:
        """Collective: every rank calls it at the same step."""


class Tables(Protocol):
    """Measures the embedding tables."""

    def __call__(self, step: int) -> TableRecord:
        """Collective: every rank calls it at the same step."""


class Fields(Protocol):
    """Scores fields, and drops some."""

    def __call__(self, step: int) -> Sequence[FieldRecord]:
        """Collective: every rank calls it after every step."""


class Save(Protocol):
    """Writes a checkpoint."""

    def __call__(self, state: TrainState) -> SaveRecord:
        """Collective: every rank calls it at the same step."""


@dataclass(frozen=True)
class Times:
    """In steps; 0 is never.

    Attributes:
        total: steps of the whole run.
    """

    total: int
    evaluate: int
    save: int


@dataclass(frozen=True)
class Loop:
    """What a run consists of once everything is built.

    Attributes:
        batches: this rank's micro-batches, from the cursor of the state that :meth:`run` starts with.
        validate: None where there is no validation split.
        tables: None in runs without tiers.
        fields: None in runs that score none.
        save_best: called instead of ``save`` when a validation is the best so far; None where that is not wanted.
    """

    train: TrainConfig
    evaluation: EvalConfig
    times: Times
    seed: int
    world: World
    stepper: Steps
    batches: Iterator[Batch]
    rates: Rates
    meter: Meter
    validate: Validation | None
    tables: Tables | None
    fields: Fields | None
    save: Save
    save_best: Save | None
    callbacks: Sequence[Callback]

    def run(self, state: TrainState) -> Iterator[TrainState]:
        """Trains until the last step or an early stop, and saves at the end; yields where it stands after each step."""
        saved = state.step
        while state.step < self.times.total and not self.exhausted(state):
            state = self._step(state)
            if self.fields is not None:
                self._tell_fields(self.fields(state.step))
            if self.validate is not None and self._due(state.step, self.times.evaluate):
                state = self._evaluate(state, self.validate)
            if self._due(state.step, self.times.save) and self._saved(self.save, state):
                saved = state.step
            yield state
        if saved != state.step:
            self._tell(self.save(state))

    def exhausted(self, state: TrainState) -> bool:
        """Whether validation has not improved for as long as early stopping allows."""
        patience = self.evaluation.early_stop.patience
        return 0 < patience <= state.stale_evals

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _step(self, state: TrainState) -> TrainState:
        self.rates.set(state.step)
        micro, waited = self._read()
        torch.manual_seed(step_seed(self.seed, state.step, self.world.rank))
        result = self.stepper.step(micro, state.step)
        state = state.stepped(self.train.batch_size)
        self.meter.add(result, micro[-1], self.train.batch_size, waited)
        if state.step % self.train.log_every == 0 or state.step == self.times.total:
            self._log(state, result)
        return state

    def _log(self, state: TrainState, result: StepResult) -> None:
        record = self.meter.record(state, result)
        tables = self.tables(state.step) if self.tables is not None else None
        for callback in self.callbacks:
            if tables is not None:
                callback.on_tables(tables)
            callback.on_step(record)

    def _read(self) -> tuple[list[Batch], float]:
        start = time.perf_counter()
        micro = [next(self.batches) for _ in range(self.train.accumulate)]
        waited = time.perf_counter() - start
        return [batch.to(self.world.device, non_blocking=True) for batch in micro], waited

    def _evaluate(self, state: TrainState, validate: Validation) -> TrainState:
        record = validate(state.step)
        stop = self.evaluation.early_stop
        state = state.evaluated(record.metrics, stop.metric, stop.min_delta)
        for callback in self.callbacks:
            callback.on_eval(record)
        if self.save_best is not None and state.best_step == state.step:
            self._saved(self.save_best, state)
        self.meter.resume()
        return state

    def _tell_fields(self, records: Sequence[FieldRecord]) -> None:
        for record in records:
            for callback in self.callbacks:
                callback.on_fields(record)
        if records:
            self.meter.resume()

    def _saved(self, save: Save, state: TrainState) -> bool:
        """Whether a checkpoint came about. A full disk in the middle of a run is no reason to lose the run."""
        try:
            self._tell(save(state))
        except CheckpointError as error:
            if self.world.is_first:
                log.warning("no checkpoint at step %d, training goes on: %s", state.step, error)
            return False
        finally:
            self.meter.resume()
        return True

    def _tell(self, record: SaveRecord) -> None:
        for callback in self.callbacks:
            callback.on_save(record)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout and the like in one step: a resumed run draws what the uninterrupted one would have."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**63 - 1)
    return mixed ^ (mixed >> 29)
