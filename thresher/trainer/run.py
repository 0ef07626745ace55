"""A run from end to end: trains or evaluates one configuration, and leaves a folder behind."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher.data.dataset import Dataset
from thresher.data.reader import Reader
from thresher.errors import CheckpointError, DataError, PipelineStalled
from thresher.trainer.assemble import assemble, total_steps
from thresher.trainer.callbacks import standard_callbacks
from thresher.trainer.callbacks.base import (
    Callback,
    EndRecord,
    EvalRecord,
    FieldRecord,
    RunFacts,
    SaveRecord,
    TableRecord,
    table_record,
)
from thresher.trainer.checkpoint import CheckpointStore, RestoredCheckpoint
from thresher.trainer.checkpoint.folders import folder_name
from thresher.trainer.checkpoint.ranks import Ranks
from thresher.trainer.config import DataConfig, RunConfig
from thresher.trainer.folder import RunFolder
from thresher.trainer.lock import locked
from thresher.trainer.loop import Loop, Times
from thresher.trainer.meter import Meter
from thresher.trainer.parts import RunParts
from thresher.trainer.pipelined.config import PipelineConfig
from thresher.trainer.pipelined.parts import assemble_pipelined
from thresher.trainer.rates import Rates
from thresher.trainer.state import TrainState, require_measured
from thresher.trainer.world import World
from thresher.versions import versions

log = logging.getLogger(__name__)


def train(config: RunConfig[Any], world: World) -> EndRecord:
    """Trains on this rank together with the other ranks of ``world``; goes on from where the run's folder stands.

    Raises:
        ThresherError: a setting, the data, the plan or a checkpoint is not usable; the message says which and why.
    """
    folder = RunFolder(config.folder)
    folder.create()
    with locked(folder.root) if world.is_first else nullcontext():
        folder.require_same(config)
        dataset = Dataset.open(config.data.path)
        steps = total_steps(config, _rows(config.data, dataset))
        parts = _assemble(config, world, dataset)
        if config.eval.early_stop.metric and config.data.valid:
            require_measured(config.eval.early_stop.metric, parts.evaluator().names())
        if config.fields.drops and config.fields.metric:
            require_measured(config.fields.metric, parts.evaluator().names(), "fields.metric")
        state = restore(parts)
        if world.is_first:
            folder.write_config(config)
            parts.plan.save(folder.plan)
        return Training(parts, steps, standard_callbacks(config, folder.root, world)).run(state)


def _assemble(config: RunConfig[Any], world: World, dataset: Dataset) -> RunParts:
    return (assemble_pipelined if config.pipeline.is_on else assemble)(config, world, dataset)


def _rows(data: DataConfig, dataset: Dataset) -> int:
    """Rows of the training split; none of the splits that a run reads is empty."""
    for name in (data.train, data.valid, data.test):
        if name and not dataset.split(name).rows:
            raise DataError(
                f"split '{name}' has no rows",
                where=str(dataset.folder),
                fix="prepare the data with another split, or leave data.valid or data.test empty",
            )
    return dataset.split(data.train).rows


def evaluate(folder: Path, config: RunConfig[Any], split: str, step: int, world: World) -> EvalRecord:
    """Measures a trained run on ``split``. Collective.

    Args:
        config: of the run in ``folder``.
        step: of the checkpoint; -1 for what the end of training measured: the best weights with early stopping, else
            the newest intact ones.

    Raises:
        CheckpointError: there is no such checkpoint, or it is corrupt.
    """
    moved = config.model_copy(update={"run_dir": str(folder)})
    if world.world % config.pipeline.stages:  # checkpoints load into any cut, also into none
        moved = moved.model_copy(update={"pipeline": PipelineConfig()})
    parts = _assemble(moved, world, Dataset.open(config.data.path))
    store, weights = _store(parts), parts.weights()
    found = store.load(store.folder / folder_name(step), weights) if step >= 0 else store.restore(weights)
    if found is None:
        raise CheckpointError("holds no checkpoint", where=str(store.folder), fix="train the run first")
    measured = found.step if step >= 0 else load_best(parts, TrainState.model_validate(found.facts["state"]))
    with closing(parts.split_reader(split)) as reader:
        return parts.evaluator().run(reader, split, measured)


def restore(parts: RunParts) -> TrainState:
    """The state of the newest intact checkpoint, loaded into ``parts``; a fresh one where there is none. Collective.

    Raises:
        CheckpointError: checkpoints are there and none is intact, or the newest intact one is of other data.
    """
    found = _store(parts).restore(parts.state())
    if found is None:
        return TrainState()
    _require_same_data(parts, found)
    if parts.world.is_first:
        log.info("going on from %s (step %d)", found.path, found.step)
    return TrainState.model_validate(found.facts["state"])


def load_best(parts: RunParts, state: TrainState) -> int:
    """Loads the weights that early stopping kept into ``parts``, which hold those of ``state``. Collective.

    Returns:
        The step of the weights that ``parts`` hold now: ``state.step`` where early stopping is off or kept none.

    Raises:
        CheckpointError: they are corrupt.
    """
    if not parts.config.eval.early_stop.patience or state.best_step < 0:
        return state.step
    store = _best_store(parts)
    path = store.folder / folder_name(state.best_step)
    if not Ranks(parts.world.group).first(path.is_dir, path):
        if parts.world.is_first:
            log.warning("%s was not kept: the weights measured are those of step %d", path, state.step)
        return state.step
    store.load(path, parts.weights())
    return state.best_step


def _require_same_data(parts: RunParts, found: RestoredCheckpoint) -> None:
    split = parts.config.data.train
    if found.facts["data"] != parts.dataset.fingerprint(split):
        raise CheckpointError(
            f"was trained on other rows than split '{split}' of {parts.dataset.folder} holds now",
            where=str(found.path),
            fix="prepare the data with the options of that run again, or set another run_dir",
        )


def _store(parts: RunParts) -> CheckpointStore:
    return CheckpointStore(parts.folder.checkpoints, parts.config.checkpoint.keep, parts.world.group)


def _best_store(parts: RunParts) -> CheckpointStore:
    return CheckpointStore(parts.folder.best, 1, parts.world.group)


@dataclass(frozen=True)
class Training:
    """The steps of a run and what happens around them.

    Attributes:
        steps: of the whole run, those before a resume included.
    """

    parts: RunParts
    steps: int
    callbacks: Sequence[Callback]

    def run(self, state: TrainState) -> EndRecord:
        """Trains from ``state`` on, then measures the test split."""
        start = time.perf_counter()
        for callback in self.callbacks:
            callback.on_start(self._facts(state))
        status, message, reached = "failed", "", state
        try:
            for now in self._train(state):
                reached = now
            status = "done" if reached.step >= self.steps else "early stop"
        except Exception as error:
            message = str(error)
            if isinstance(error, PipelineStalled):  # told now: the launcher may end this rank before its report is made
                log.error("%s", message)
            raise
        finally:
            best = {"step": float(reached.best_step), **reached.best_metrics} if reached.best_metrics else {}
            record = EndRecord(status, reached.step, time.perf_counter() - start, best, message)
            for callback in self.callbacks:
                callback.on_end(record)
        return record

    def _train(self, state: TrainState) -> Iterator[TrainState]:
        """Yields where the run stands after each step; measures the test split after the last one."""
        with closing(self.parts.training_reader()) as reader:
            for reached in self._loop(state, reader).run(state):
                state = reached
                yield state
        split = self.parts.config.data.test
        if split:
            self._tell_eval(self._measure(split, load_best(self.parts, state)))

    def _loop(self, state: TrainState, reader: Reader) -> Loop:
        parts, config = self.parts, self.parts.config
        rates = Rates(config.optim, self.steps, parts.dense, parts.set_table_lr)
        every = config.eval.every_steps or max(reader.rows // config.train.batch_size, 1)
        return Loop(
            train=config.train,
            evaluation=config.eval,
            times=Times(self.steps, every, config.checkpoint.every_steps),
            seed=config.seed,
            world=parts.world,
            stepper=parts.stepper(),
            batches=reader.stream(state.cursor),
            rates=rates,
            meter=self._meter(reader, rates),
            validate=self._validate if config.data.valid else None,
            tables=self._measure_tables if parts.has_tiers else None,
            fields=self._after_step if parts.fields is not None else None,
            save=lambda now: self._save(_store(parts), now),
            save_best=(lambda now: self._save(_best_store(parts), now)) if config.eval.early_stop.patience else None,
            callbacks=self.callbacks,
        )

    def _meter(self, reader: Reader, rates: Rates) -> Meter:
        return Meter(self.parts.world, reader.rows, rates, *self.parts.watched())

    def _validate(self, step: int) -> EvalRecord:
        return self._measure(self.parts.config.data.valid, step, self.parts.config.eval.max_rows)

    def _after_step(self, step: int) -> list[FieldRecord]:
        fields = self.parts.fields
        assert fields is not None
        return fields.after_step(step, self.steps, self._validate)

    def _measure_tables(self, step: int) -> TableRecord:
        return table_record(step, self.parts.ledger())

    def _measure(self, split: str, step: int, max_rows: int = 0) -> EvalRecord:
        with closing(self.parts.split_reader(split)) as reader:
            return self.parts.evaluator().run(reader, split, step, max_rows)

    def _tell_eval(self, record: EvalRecord) -> None:
        for callback in self.callbacks:
            callback.on_eval(record)

    def _save(self, store: CheckpointStore, state: TrainState) -> SaveRecord:
        config, dataset = self.parts.config, self.parts.dataset
        facts = {
            "state": state.model_dump(),
            "data": dataset.fingerprint(config.data.train),
            "seed": config.seed,
            "plan": self.parts.plan.model_dump(),
        }
        self.parts.require_finite(state.step)
        saved = store.save(state.step, self.parts.state(), facts)
        return SaveRecord(saved.step, saved.path, saved.seconds, saved.bytes)

    def _facts(self, state: TrainState) -> RunFacts:
        parts, manifest = self.parts, self.parts.dataset.manifest
        rows = {name: sum(part.rows for part in files) for name, files in manifest.splits.items()}
        return RunFacts(
            config=parts.config,
            schema=parts.dataset.schema,
            data_facts={**manifest.facts, "rows": rows, "recipe": manifest.recipe, "options": manifest.options},
            plan=parts.plan,
            versions=versions(),
            folder=parts.folder.root,
            rank=parts.world.rank,
            world=parts.world.world,
            device=str(parts.world.device),
            dense_parameters=parts.dense_parameters,
            total_steps=self.steps,
            resumed_step=state.step,
        )
