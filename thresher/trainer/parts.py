"""What a run is made of before the first step, as the loop and what surrounds it see it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from thresher.data.batch import Batch
from thresher.data.dataset import Dataset
from thresher.data.reader import Reader
from thresher.embeddings.policy.ledger import Ledger
from thresher.pipeline.parallel.dense import Stepping
from thresher.sharding.plan import Plan
from thresher.trainer.callbacks.base import EvalRecord
from thresher.trainer.callbacks.fields import FieldPruning
from thresher.trainer.checkpoint import State
from thresher.trainer.config import RunConfig
from thresher.trainer.folder import RunFolder
from thresher.trainer.step import StepResult
from thresher.trainer.world import World


class Steps(Protocol):
    """Takes the steps of a run."""

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Forward and backward of this rank's micro-batches, then the update of the dense part. Collective.

        Raises:
            TrainingDiverged: the loss is NaN or infinite.
        """


class Measures(Protocol):
    """Measures a model on the rows of a reader. Collective."""

    def run(self, reader: Reader, split: str, step: int, max_rows: int = 0) -> EvalRecord:
        """One pass over the split, or over its first ``max_rows`` rows."""

    def names(self) -> list[str]:
        """Names of the metrics that :meth:`run` measures."""


@dataclass(frozen=True)
class Share:
    """Which part of the data a process reads.

    Attributes:
        rank, world: the ``rank``-th of ``world`` equal parts.
        accumulate: batches per step.
        multiple: a batch has a multiple of so many samples.
    """

    rank: int
    world: int
    accumulate: int = 1
    multiple: int = 1


@dataclass(frozen=True)
class RunParts(ABC):
    """A run, whatever way its model is spread over processes.

    Attributes:
        dense: optimizer of everything outside the tables.
        fields: None in runs that score none.
    """

    config: RunConfig[Any]
    world: World
    folder: RunFolder
    dataset: Dataset
    dense: Stepping
    fields: FieldPruning | None

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """Where tables are."""

    @property
    @abstractmethod
    def share(self) -> Share:
        """What this process reads."""

    @property
    @abstractmethod
    def dense_parameters(self) -> int:
        """Numbers in the parameters outside the tables, of the whole model."""

    @abstractmethod
    def state(self) -> State:
        """The tensors of a checkpoint."""

    @abstractmethod
    def weights(self) -> State:
        """The model alone: all that an evaluation needs."""

    @abstractmethod
    def stepper(self) -> Steps:
        """Takes the steps."""

    @abstractmethod
    def evaluator(self) -> Measures:
        """Measures the model on a split."""

    @abstractmethod
    def require_finite(self, step: int) -> None:
        """Refuses to go on with weights that are no numbers.

        Raises:
            TrainingDiverged: names the first such parameter of this process.
        """

    @abstractmethod
    def set_table_lr(self, lr: float) -> None:
        """Sets the learning rate of all tables from the next step on."""

    @property
    @abstractmethod
    def has_tiers(self) -> bool:
        """Whether rows of tables move between precisions."""

    @abstractmethod
    def ledger(self) -> Ledger:
        """What tables with tiers take; only where there are some. Collective."""

    @abstractmethod
    def watched(self) -> tuple[str, int]:
        """Output and label column of the running AUC; an empty output for none."""

    def training_reader(self) -> Reader:
        """This process's part of the training split, batch by batch."""
        data, share = self.config.data, self.share
        return Reader(
            self.dataset,
            data.train,
            batch_size=self.config.train.batch_size // (share.world * share.accumulate),
            rank=share.rank,
            world=share.world,
            seed=self.config.seed,
            shuffle=data.shuffle,
            window_rows=data.window_rows,
            prefetch=data.prefetch,
            max_bad_share=data.max_bad_share,
            quarantine=self.folder.quarantine(self.world.rank),
        )

    def split_reader(self, split: str) -> Reader:
        """This process's part of a held-out split."""
        share = self.share
        samples = max((self.config.eval.batch_size or self.config.train.batch_size) // share.world, 1)
        return Reader(
            self.dataset,
            split,
            batch_size=-(-samples // share.multiple) * share.multiple,
            rank=share.rank,
            world=share.world,
            window_rows=self.config.data.window_rows,
            shuffle=False,
            prefetch=self.config.data.prefetch,
            max_bad_share=self.config.data.max_bad_share,
            quarantine=self.folder.quarantine(self.world.rank),
        )
