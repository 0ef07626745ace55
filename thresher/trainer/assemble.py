"""Builds the parts of a run with sharded tables from its configuration, the same on every rank but for the shards."""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torchrec.optim.keyed import KeyedOptimizer

from thresher.data.dataset import Dataset
from thresher.data.reader import Reader
from thresher.data.schema import Schema
from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.fields.field import find_fields
from thresher.embeddings.policy.ledger import Ledger
from thresher.embeddings.tables import find_tables, module_name
from thresher.errors import ConfigError
from thresher.sharding.frequencies import Frequency, measure_frequencies
from thresher.sharding.model import ShardedModel, shard
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan, repriced
from thresher.trainer.callbacks.fields import FieldPruning
from thresher.trainer.checkpoint import Directories, LazyOptimizer, State, TableState, model_state
from thresher.trainer.config import RunConfig
from thresher.trainer.evaluate import Evaluator
from thresher.trainer.folder import RunFolder
from thresher.trainer.model import Model, Ranker
from thresher.trainer.optim import dense_optimizer
from thresher.trainer.parts import RunParts, Share
from thresher.trainer.step import Stepper, require_finite_weights
from thresher.trainer.world import World

BYTES_PER_GB = 10**9


@dataclass(frozen=True)
class Parts(RunParts):
    """A run whose tables are sharded over all ranks and whose dense part is replicated.

    Attributes:
        dense: a :class:`KeyedOptimizer`, whose state is saved by name.
    """

    dense: KeyedOptimizer
    model: Model
    sharded: ShardedModel

    @property
    def plan(self) -> Plan:
        """See :class:`RunParts`."""
        return self.sharded.plan

    @property
    def share(self) -> Share:
        """See :class:`RunParts`."""
        return Share(self.world.rank, self.world.world, self.config.train.accumulate)

    @property
    def dense_parameters(self) -> int:
        """See :class:`RunParts`."""
        return sum(parameter.numel() for parameter in self.sharded.dense_parameters().values())

    def state(self) -> State:
        """Weights, table and dense optimizer state, scores of fields (these last)."""
        scores = {} if self.fields is None else {"field_scores": self.fields.training_state()}
        return {
            **self.weights(),
            "table_optimizer": TableState(self.sharded),
            "dense_optimizer": LazyOptimizer(self.dense),
            **scores,
        }

    def weights(self) -> State:
        """The model alone, dropped fields included: all that an evaluation needs.

        It loads into any plan, but for tables with raw ids, which want the cut that they were saved with.
        """
        held = self.sharded.held
        raw = {"directories": Directories(self.sharded)} if held is not None and held.engine.dynamic else {}
        dropped = {} if self.fields is None else {"fields": self.fields.weights_state()}
        return {"model": model_state(self.sharded), **raw, **dropped}

    def stepper(self) -> Stepper:
        """Takes the steps."""
        weight = self.config.tiers.positive_weight
        return Stepper(self.sharded, self.model, self.dense, self.config.train, self.world.device, weight)

    def evaluator(self) -> Evaluator:
        """Measures the model on a split."""
        schema = self.dataset.schema
        return Evaluator(self.sharded.wrapped, self.model, schema, self.config.train, self.config.eval, self.world)

    def require_finite(self, step: int) -> None:
        """See :class:`RunParts`."""
        require_finite_weights(self.sharded.wrapped, step)

    def set_table_lr(self, lr: float) -> None:
        """See :class:`RunParts`."""
        self.sharded.set_table_lr(lr)

    @property
    def has_tiers(self) -> bool:
        """See :class:`RunParts`."""
        return self.sharded.tiers is not None

    def ledger(self) -> Ledger:
        """See :class:`RunParts`."""
        assert self.sharded.tiers is not None
        return self.sharded.tiers.ledger()

    def watched(self) -> tuple[str, int]:
        """See :class:`RunParts`."""
        if not isinstance(self.model, Ranker):
            return "", 0
        column = [label.name for label in self.dataset.schema.labels].index(self.model.labels[0])
        binary = self.dataset.schema.labels[column].task == "binary"
        return self.model.labels[0] if binary else "", column


def assemble(config: RunConfig[Any], world: World, dataset: Dataset) -> Parts:
    """Builds, plans and shards the model. Collective.

    Raises:
        ThresherError: the model does not fit the data, or the plan does not fit the model or the ranks.
    """
    torch.manual_seed(config.seed)
    dynamic = dynamic_tables(config, dataset.schema)
    model = config.model.build(dataset.schema, torch.device("meta"))
    found = find_fields(find_tables(model))
    frequencies = measured(config, dataset, model)
    plan = plan_of(config, model, world.world, world.local_world, world.device.type, frequencies, dynamic)
    sharded = shard(
        model,
        plan,
        device=world.device,
        optimizer=config.optim.tables,
        seed=config.seed,
        group=world.group,
        tiers=config.tiers if config.tiers.enabled else None,
        dynamic=dynamic,
        wire=config.sharding.wire,
    )
    dense = dense_optimizer(sharded.dense_parameters(), config.optim.dense)
    fields = None
    if config.fields.enabled:
        fields = FieldPruning(config.fields, found, sharded, model, world, config.train.accumulate)
    return Parts(config, world, RunFolder(config.folder), dataset, dense, fields, model, sharded)


def dynamic_tables(config: RunConfig[Any], schema: Schema) -> dict[str, DynamicTable]:
    """How rows are given to the ids of each table whose ids are raw, by its name in the model (``module_name``).

    Raises:
        ConfigError: something is said of a table whose ids are rows already.
    """
    raw = [table.name for table in schema.tables if table.ids == "raw"]
    for name in config.dynamic:
        if name not in raw:
            raise ConfigError(
                f"the data have no table '{name}' with raw ids",
                where=f"dynamic.{name}",
                fix=f"tables with raw ids: {', '.join(raw) or 'none'}; prepare the data with ids=raw",
            )
    return {module_name(schema, name): config.dynamic.get(name, DynamicTable()) for name in raw}


def measured(config: RunConfig[Any], dataset: Dataset, model: Model) -> dict[str, Frequency]:
    """Lookups of the tables in the first ``sharding.measure_rows`` training rows, the same on every rank.

    Raises:
        DataError, SchemaError, BadBatch: a file or a row is bad.
    """
    data, rows = config.data, min(config.sharding.measure_rows, dataset.split(config.data.train).rows)
    if not rows or config.sharding.plan:
        return {}
    size = min(config.train.batch_size, rows)
    with tempfile.TemporaryDirectory(prefix="thresher-measure-") as scratch:
        reader = Reader(
            dataset,
            data.train,
            batch_size=size,
            seed=config.seed,
            shuffle=data.shuffle,
            window_rows=min(data.window_rows, rows),
            prefetch=0,
            max_bad_share=data.max_bad_share,
            quarantine=Path(scratch),
        )
        batches = islice(reader.stream(0), -(-rows // size))
        return measure_frequencies((batch.sparse for batch in batches), find_tables(model))


def plan_of(
    config: RunConfig[Any],
    model: Model,
    world: int,
    local_world: int,
    device: str,
    frequencies: Mapping[str, Frequency] | None = None,
    raw: Collection[str] = (),
) -> Plan:
    """The pinned plan, or a new one.

    Args:
        frequencies: of tables, where they were measured.
        raw: tables with raw ids: cut by rows unless the user says otherwise, for ``auto`` might replicate them.

    Raises:
        PlanError: it does not fit the model, the ranks or the memory.
        ConfigError: the tiers do not fit the tables.
    """
    sharding = config.sharding
    if sharding.plan:
        return repriced(Plan.load(Path(sharding.plan)), model, config.optim.tables, config.tiers)
    return make_plan(
        model,
        world=world,
        local_world=local_world,
        device=device,
        optimizer=config.optim.tables,
        default=sharding.default,
        tables=dict.fromkeys(raw, "row_wise" if world > 1 else "table_wise") | sharding.tables,
        memory_bytes=int(sharding.memory_gb * BYTES_PER_GB),
        batch_size=max(config.train.batch_size // world, 1),
        tiers=config.tiers,
        frequencies=frequencies,
    )


def total_steps(config: RunConfig[Any], rows: int) -> int:
    """Optimizer steps of the whole run over ``rows`` training rows.

    Raises:
        ConfigError: there are too few rows for a single step.
    """
    train = config.train
    steps = int(train.epochs * rows / train.batch_size + 1e-9)
    if steps < 1:
        raise ConfigError(
            f"{train.epochs:g} epochs of {rows} rows do not fill one batch of {train.batch_size}",
            where="train.batch_size",
            fix=f"use at most {int(train.epochs * rows)}, or more epochs",
        )
    return min(steps, train.max_steps) if train.max_steps else steps
