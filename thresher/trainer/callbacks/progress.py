"""What a person at the terminal sees of a run."""

import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from thresher.sharding.show import plan_table
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
from thresher.trainer.report.build import REPORT


class Progress(Callback):
    """A progress bar with the newest figures; evaluations, checkpoints and the end are lines of their own.

    Where the console is no terminal, or has no colour, every record is a plain line instead.

    Args:
        console: where to print.
        clock: seconds; the estimate of what remains is made from it.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bar = _bar(console) if console.is_terminal and not console.no_color else None
        self._first_step = self._total = 0
        self._began = 0.0
        self._report = Path(REPORT)
        self._tables = ""

    def on_start(self, facts: RunFacts) -> None:
        self._first_step, self._total, self._began = facts.resumed_step, facts.total_steps, self._clock()
        self._report = facts.folder / REPORT
        if facts.plan.tables:
            self._console.print(plan_table(facts.plan))
        self._say(headline(facts))
        if self._bar is not None:
            self._bar.add_task("train", total=facts.total_steps, completed=facts.resumed_step, figures="")
            self._bar.start()

    def on_tables(self, record: TableRecord) -> None:
        self._tables = f"  {occupancy(record)}"

    def on_step(self, record: StepRecord) -> None:
        eta = self._eta(record.step)
        if self._bar is not None:
            speed = f"{record.samples_per_s:,.0f}/s  wait {record.data_wait:.0%}"
            figures = f"{quality(record)}  {speed}{self._tables}  eta {eta}"
            self._bar.update(self._bar.task_ids[0], completed=record.step, figures=figures)
        else:
            speed = f"{record.samples_per_s:,.0f} samples/s  data wait {record.data_wait:.0%}{self._tables}"
            self._say(f"step {record.step:,}/{self._total:,}  {quality(record)}  {speed}  eta {eta}")

    def on_fields(self, record: FieldRecord) -> None:
        self._say(f"step {record.step:,}  fields: {record.note}")

    def on_eval(self, record: EvalRecord) -> None:
        metrics = "  ".join(f"{name} {figure(value)}" for name, value in record.metrics.items())
        self._say(
            f"step {record.step:,}  {record.split}: {metrics}  ({record.rows:,} rows, {record.seconds:.1f} s)", "bold"
        )

    def on_save(self, record: SaveRecord) -> None:
        size = f"{record.bytes / 2**20:,.1f} MiB"
        self._say(f"step {record.step:,}  saved {record.path} ({size}, {record.seconds:.1f} s)", "dim")

    def on_end(self, record: EndRecord) -> None:
        if self._bar is not None:
            self._bar.stop()
        spent = timedelta(seconds=round(record.seconds))
        style = "red" if record.status == "failed" else "green"
        self._say(f"{record.status} at step {record.step:,} after {spent}; report: {self._report}", style)

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "-"
        return str(timedelta(seconds=round((self._clock() - self._began) / done * (self._total - step))))

    def _say(self, line: str, style: str = "") -> None:
        # Text, not markup: paths and metric names may hold brackets. Long lines are the terminal's to wrap.
        self._console.print(Text(line, style=style), soft_wrap=True)


def headline(facts: RunFacts) -> str:
    """What is about to run, in one line."""
    tables = sum(facts.plan.bytes_of(rank) for rank in range(facts.plan.world))
    ranks = f"{facts.world} ranks" if facts.world > 1 else "1 rank"
    resumed = f", resumed at step {facts.resumed_step:,}" if facts.resumed_step else ""
    return (
        f"{facts.config.model.name} on {facts.schema.name}: {facts.total_steps:,} steps on {ranks} ({facts.device}), "
        f"tables {tables / 2**20:,.1f} MiB with optimizer state, {facts.dense_parameters:,} dense parameters{resumed}"
    )


def quality(record: StepRecord) -> str:
    """Loss and AUC of the newest steps."""
    auc = "" if math.isnan(record.auc) else f"  auc {record.auc:.4f}"
    return f"loss {figure(record.loss)}{auc}"


def occupancy(record: TableRecord) -> str:
    """Bytes of the tables as a share of fp32, and the rows in each tier that has some, the most precise first."""
    updated = sum(number for tier, number in record.rows.items() if tier != "none")
    shown = [(tier, number) for tier, number in reversed(record.rows.items()) if tier != "none" and number]
    tiers = [f"{tier} {number / updated:.0%}" for tier, number in shown]
    return f"tables {record.share:.0%} ({' '.join(tiers) or 'untouched'})"


def figure(value: float) -> str:
    """Four decimals, or a dash where a metric is undefined.

    >>> figure(0.76543), figure(float("nan"))
    ('0.7654', '-')
    """
    return "-" if math.isnan(value) else f"{value:.4f}"


def _bar(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("step {task.completed:,}/{task.total:,}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )
