"""The moments of a run that a callback may use, and what it is told at each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thresher.data.schema import Schema
from thresher.embeddings.policy.ledger import Ledger
from thresher.embeddings.rows.tiers import Tier
from thresher.sharding.plan import Plan
from thresher.trainer.config import RunConfig


@dataclass(frozen=True)
class RunFacts:
    """What does not change during a run.

    Attributes:
        data_facts: ``Dataset`` facts for the report: rows per split, recipe, options, quarantined rows.
        versions: distribution name to version, of Thresher and the libraries it stands on.
        dense_parameters: number of parameters outside the tables.
        resumed_step: step of the checkpoint that the run goes on from; 0 for a fresh one.
    """

    config: RunConfig[Any]
    schema: Schema
    data_facts: dict[str, Any]
    plan: Plan
    versions: dict[str, str]
    folder: Path
    rank: int
    world: int
    device: str
    dense_parameters: int
    total_steps: int
    resumed_step: int


@dataclass(frozen=True)
class StepRecord:
    """The ``train.log_every`` steps up to ``step``; fewer at the end of a run and in the first record after a resume.

    Attributes:
        samples: samples consumed by all ranks since the beginning of the run.
        loss: mean over those steps and all ranks.
        auc: of rank 0's newest 65,536 training samples, first label; NaN where it is undefined.
        samples_per_s: over all ranks.
        data_wait: share of the time spent waiting for the reader, largest over ranks.
        grad_norm: norm of the dense gradient at ``step`` before clipping; NaN where it is not computed.
        seconds: those steps took, evaluations and saves left out.
    """

    step: int
    epoch: float
    samples: int
    loss: float
    auc: float
    samples_per_s: float
    data_wait: float
    lr_dense: float
    lr_tables: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class TableRecord:
    """What the embedding tables take at ``step``, over all ranks; optimizer state is part of all bytes.

    Attributes:
        live_bytes: in use.
        held_bytes: committed: free slots count, and pages are whole.
        budget_bytes: what they may take.
        fp32_bytes: what they would take without tiers.
        rows: rows of tables with tiers, by tier (``none`` for those never updated).
        shares: live bytes as a share of the fp32 bytes, by path of each table with tiers.
        promoted, demoted, refused: rows that moved to a higher or lower tier or found no room there, since the start.
    """

    step: int
    live_bytes: int
    held_bytes: int
    budget_bytes: int
    fp32_bytes: int
    rows: dict[str, int]
    shares: dict[str, float]
    promoted: int
    demoted: int
    refused: int

    @property
    def share(self) -> float:
        """Live bytes as a share of the fp32 bytes."""
        return self.live_bytes / self.fp32_bytes


FieldEvent = Literal["scores", "drop", "keep", "restore", "end", "dry run"]


@dataclass(frozen=True)
class FieldRecord:
    """What became known of the fields at ``step``, or was done with them.

    Attributes:
        event: scores were read; fields were dropped on trial; a trial ended well, or its fields were taken back;
            nothing more may go; or, without doing it, what would go.
        changed: names of the fields it is about, least important first.
        note: the same in a line for people.
        value, reference: the metric at the end of a trial, and before the first one; NaN otherwise.
        scores, errors: mean change of a sample's loss and its standard error, by field; of a dropped field the last
            before; NaN where there is none yet.
        bytes: of tables, by field; a table that several fields read is shared among them.
        dropped: step by field.
        table_bytes: of tables that are still read.
        all_bytes: of all tables.
    """

    step: int
    event: FieldEvent
    changed: tuple[str, ...]
    note: str
    value: float
    reference: float
    scores: dict[str, float]
    errors: dict[str, float]
    bytes: dict[str, int]
    dropped: dict[str, int]
    table_bytes: int
    all_bytes: int


def table_record(step: int, ledger: Ledger) -> TableRecord:
    """The books of the tables as a record."""
    return TableRecord(
        step=step,
        live_bytes=ledger.live_bytes,
        held_bytes=ledger.held_bytes,
        budget_bytes=ledger.budget_bytes,
        fp32_bytes=ledger.fp32_bytes,
        rows={tier.name.lower(): rows for tier, rows in zip(Tier, ledger.rows, strict=True)},
        shares={table.path: table.share for table in ledger.tables},
        promoted=ledger.moves.promoted,
        demoted=ledger.moves.demoted,
        refused=ledger.moves.refused,
    )


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation. Metric names are ``auc``, ``hr@10`` and so on, prefixed ``<label>/`` from the second label on."""

    step: int
    split: str
    rows: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class SaveRecord:
    """One checkpoint written."""

    step: int
    path: Path
    seconds: float
    bytes: int


@dataclass(frozen=True)
class EndRecord:
    """How the run ended: ``done``, ``early stop`` or ``failed``.

    Attributes:
        seconds: since this process began, whether it resumed or not.
        best: the best validation metrics, and the step of that validation as ``step``; empty where there was none.
        message: the error's text where it failed.
    """

    status: str
    step: int
    seconds: float
    best: dict[str, float]
    message: str = ""


class Callback:
    """Does nothing. Subclasses override the moments they need; a rank calls its callbacks in order."""

    def on_start(self, facts: RunFacts) -> None:
        """Before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """Every ``train.log_every`` steps and at the last one."""

    def on_tables(self, record: TableRecord) -> None:
        """At the steps of :meth:`on_step`, before it, in runs with tiers."""

    def on_fields(self, record: FieldRecord) -> None:
        """When fields were scored, dropped or taken back."""

    def on_eval(self, record: EvalRecord) -> None:
        """After an evaluation."""

    def on_save(self, record: SaveRecord) -> None:
        """After a checkpoint is in place."""

    def on_end(self, record: EndRecord) -> None:
        """After the last step, or on failure."""
