"""Scores fields while a run trains, and drops those that do not matter, round by round. Unlike callbacks, which only
watch and live on the first rank, it acts on the model: every rank has one and calls it after every step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from thresher.data.batch import Batch
from thresher.embeddings.fields.choice import Chooser
from thresher.embeddings.fields.config import FieldConfig
from thresher.embeddings.fields.field import Field
from thresher.embeddings.fields.pruning import FieldPruner
from thresher.embeddings.fields.rounds import Phase, Rounds
from thresher.embeddings.fields.scorer import FieldScorer
from thresher.embeddings.fields.scores import FieldScores
from thresher.embeddings.fields.tap import attach
from thresher.embeddings.policy.budget import readable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.errors import ConfigError
from thresher.sharding.model import ShardedModel
from thresher.trainer.callbacks.base import EvalRecord, FieldEvent, FieldRecord
from thresher.trainer.model import Model, Retriever
from thresher.trainer.state import lower_is_better, require_measured
from thresher.trainer.world import World

Validate = Callable[[int], EvalRecord]
"""Measures the validation split at a step. Collective."""
NAMED = 3
"""Fields named at each end of a line about scores."""


class FieldPruning:
    """The fields of a run.

    Args:
        fields: of the model.
        parts: micro-batches of a step.

    Attributes:
        pruner: part of the model's weights, as it were: an evaluation needs it, too.
        collections: the model's collections of tables by path.

    Raises:
        ConfigError: the model ranks items by their own vectors, a protected field is none of the model's, or a number
            of bytes is not usable.
    """

    def __init__(
        self,
        config: FieldConfig,
        fields: Sequence[Field],
        sharded: ShardedModel,
        model: Model,
        world: World,
        parts: int,
    ) -> None:
        _require_ranker(model)
        self.config, self._sharded, self._parts = config, sharded, parts
        self.pruner = FieldPruner(fields, world.device)
        self._scorer = FieldScorer(fields, world.device, world.group)
        self._rounds = Rounds(config, len(fields))
        table_bytes = {table.path: sum(shard.bytes for shard in table.shards) for table in sharded.plan.tables}
        self._chooser = Chooser.of(config, fields, table_bytes)
        self._score = torch.full((len(fields),), math.nan, dtype=torch.float64)
        self._error = torch.full((len(fields),), math.nan, dtype=torch.float64)
        self._step = 0
        self.collections = {path: _collection(sharded.wrapped, path) for path in {field.module for field in fields}}
        attach(self.collections, self.pruner, self._scorer)
        sharded.wrapped.register_forward_pre_hook(self._begin)

    def after_step(self, step: int, last: int, validate: Validate) -> list[FieldRecord]:
        """Ends a step: judges the fields on trial, reads scores, drops fields, each at its time. Collective.

        Args:
            last: step of the run.

        Returns:
            What happened, in order.
        """
        self._step = step
        found = []
        if self._rounds.check_due(step, last):
            found.append(self._judge(step, validate))
        if self._rounds.scores_due(step):
            found.append(self._read(step))
            if self.config.dry_run:
                found.append(self._rehearse(step))
            elif self._rounds.phase is Phase.SCORING and step < last:
                found.append(self._drop(step, validate))
            self._scorer.reset()
        return found

    def scores(self) -> FieldScores:
        """What the steps since the last scoring say. Collective."""
        return self._scorer.read()

    def means(self) -> Tensor:
        """[columns of all fields] fp32: the mean of each field's vectors."""
        return self._scorer.mean()

    def weights_state(self) -> "PrunedWeights":
        """The dropped fields and their constants, for a checkpoint."""
        return PrunedWeights(self.pruner, self._sharded)

    def training_state(self) -> "FieldPruning":
        """Scores, means and rounds, for a checkpoint; loaded after ``weights_state``."""
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors. Collective."""
        known = {"step": torch.tensor(self._step), "score": self._score.clone(), "error": self._error.clone()}
        return {**known, **self._scorer.state_dict(), **self._rounds.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Goes on from there; memory that had been given back is given back again."""
        self._step = int(state_dict["step"])
        self._score, self._error = state_dict["score"].clone(), state_dict["error"].clone()
        self._scorer.load_state_dict(state_dict)
        self._rounds.load_state_dict(state_dict)
        self._release()

    def _begin(self, wrapped: nn.Module, given: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model."""
        if wrapped.training and torch.is_grad_enabled() and self.config.looks(self._step):
            batch: Batch = given[0]
            self._scorer.begin(batch.weight, self._parts)
        else:
            self._scorer.pause()

    def _read(self, step: int) -> FieldRecord:
        scores = self._scorer.read()
        kept = [number for number in range(len(scores.fields)) if number not in self.pruner.dropped]
        self._score[kept], self._error[kept] = scores.score.cpu()[kept], scores.error.cpu()[kept]
        return self._record(step, "scores", (), self._ends(kept, scores))

    def _ends(self, kept: list[int], scores: FieldScores) -> str:
        """The most and the least important fields that are kept."""
        ranked = sorted(kept, key=lambda number: -float(self._score[number]))
        told = [f"{scores.fields[number].name} {float(self._score[number]):.3g}" for number in ranked]
        if len(told) > 2 * NAMED:
            told = [*told[:NAMED], "...", *told[-NAMED:]]
        return f"scores: {', '.join(told)}"

    def _drop(self, step: int, validate: Validate) -> FieldRecord:
        chosen = self._chooser.next_round(self._score, self.pruner.dropped)
        if not chosen:
            self._rounds.end()
            return self._record(step, "end", (), f"no more fields go: {self._why_none()}")
        if math.isnan(self._rounds.reference):
            _, self._rounds.reference = self._metric(validate(step))
        self.pruner.drop(chosen, self._scorer.mean(), step)
        self._rounds.dropped(chosen, step)
        trial = f"on trial for {self.config.check_after:,} steps"
        return self._record(step, "drop", chosen, f"dropped {self._names(chosen)}, {trial}")

    def _judge(self, step: int, validate: Validate) -> FieldRecord:
        name, value = self._metric(validate(step))
        on_trial, reference = self._rounds.pending, self._rounds.reference
        held = self._rounds.held(value, lower_is_better(name))
        self._rounds.judged(held)
        measured = f"{name} {value:.4f} after {reference:.4f}"
        if not held:
            self.pruner.restore(on_trial)
            told = f"took {self._names(on_trial)} back: {measured}; no more fields go"
            return self._record(step, "restore", on_trial, told, value)
        self._release()
        over = "; that was the last round" if self._rounds.phase is Phase.OVER else ""
        return self._record(step, "keep", on_trial, f"{self._names(on_trial)} stay dropped: {measured}{over}", value)

    def _rehearse(self, step: int) -> FieldRecord:
        """What all rounds would drop if the metric held."""
        gone: list[int] = []
        for _ in range(self.config.rounds or len(self.pruner.fields)):
            gone += self._chooser.next_round(self._score, gone)
        left = readable(self._chooser.bytes_in_use(gone))
        return self._record(
            step, "dry run", tuple(gone), f"would drop {self._names(gone)}; {left} of tables would stay"
        )

    def _metric(self, record: EvalRecord) -> tuple[str, float]:
        """Name and value of what must not get worse."""
        name = self.config.metric or next(iter(record.metrics))
        require_measured(name, record.metrics, "fields.metric")
        return name, record.metrics[name]

    def _why_none(self) -> str:
        if self._chooser.within_budget(self.pruner.dropped):
            return f"tables take {readable(self._chooser.bytes_in_use(self.pruner.dropped))}, as the budget allows"
        return "all others are protected or have no score"

    def _names(self, numbers: Sequence[int]) -> str:
        return ", ".join(self.pruner.fields[number].name for number in numbers) or "nothing"

    def _record(
        self, step: int, event: FieldEvent, changed: Sequence[int], note: str, value: float = math.nan
    ) -> FieldRecord:
        names = [field.name for field in self.pruner.fields]
        return FieldRecord(
            step=step,
            event=event,
            changed=tuple(names[number] for number in changed),
            note=note,
            value=value,
            reference=self._rounds.reference,
            scores=dict(zip(names, self._score.tolist(), strict=True)),
            errors=dict(zip(names, self._error.tolist(), strict=True)),
            bytes=dict(zip(names, map(round, self._chooser.field_bytes()), strict=True)),
            dropped={names[number]: int(self.pruner.dropped_at[number]) for number in sorted(self.pruner.dropped)},
            table_bytes=self._chooser.bytes_in_use(self.pruner.dropped),
            all_bytes=self._chooser.bytes_in_use(()),
        )

    def _release(self) -> None:
        """Gives back the memory of tables that nobody reads any more, but for those on trial."""
        settled = self.pruner.idle_tables(but=self._rounds.pending)
        for table in self._sharded.tables():
            if table.path in settled and not table.storage.released:
                if self._sharded.tiers is not None and not isinstance(table.storage, TieredTable):
                    self._sharded.tiers.flat_bytes -= table.storage.nbytes
                table.storage.release()


class PrunedWeights:
    """Dropped fields and their constants as part of a checkpoint, beside the weights of the model."""

    def __init__(self, pruner: FieldPruner, sharded: ShardedModel) -> None:
        self._pruner, self._sharded = pruner, sharded

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors, the same on all ranks."""
        return self._pruner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Goes on from there. Tables have the rows of the checkpoint, also those that had been given up."""
        self._pruner.load_state_dict(state_dict)
        for table in self._sharded.tables():
            table.storage.released = False


def _collection(wrapped: DistributedModelParallel, path: str) -> nn.Module:
    module: nn.Module = wrapped.module.get_submodule(path)
    return module


def _require_ranker(model: Model) -> None:
    if isinstance(model, Retriever):
        raise ConfigError(
            "fields are scored by what they tell of a sample, but this model ranks items by the vectors of one table",
            where="fields.score_every",
            fix="set it to 0, or train a ranker (deepfm, dcnv2, dlrm, ...)",
        )
