"""AUC against the bytes of the tables, on real data, through the real trainer, over seeds.

``python -m benchmarks.compression [--data NAME ...] [--models NAME ...] [--ways NAME ...] [--seeds N] [--split NAME]
[--runs PATH] [--quick] [--json PATH] [--plot PATH]``

A way is what is done to the rows: nothing, one precision for all, tiers under a budget, tiers and pruned fields. Bytes
are those in use after the last step (headers and optimizer state included) as a share of the fp32 tables with theirs.
AUC is that of the test part; the drop of a way is taken against fp32 with the same seed, which sets the initial weights
and the order of the rows. ``--runs`` is a file of one line a run: what it holds is not trained again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks import measure
from benchmarks.ctr.contestants import one_rank
from benchmarks.datasets import CACHE, dataset
from benchmarks.quality import ADAMW, JOURNEY, WORLD, Plain, small_mlp
from benchmarks.summary import summary
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.settings import parse
from thresher.trainer.assemble import Parts, assemble, total_steps
from thresher.trainer.callbacks.base import Callback, EvalRecord, StepRecord
from thresher.trainer.run import Training
from thresher.trainer.state import TrainState
from thresher.zoo.registry import RunConfig

NEVER = 1 << 30
WIDTH = 64
"""Columns of a row. Headers of 16 bytes leave little to win in narrower ones."""
DROPS = ("tiers+pruning 30%", "tiers+pruning 15%")
ROUNDS = 4


@dataclass(frozen=True)
class Task:
    """A data set and how models are trained on it.

    Attributes:
        data: name of the prepared set; it has a validation part.
        models: model settings by name.
        train: epochs, batch size, and an upper bound on steps where the set is large.
        optim: of the dense part and of the tables.
        protect: fields that pruning may not drop.
        kept: shares of the tables' bytes that the two ways with pruning leave.
    """

    data: str
    models: dict[str, Plain]
    train: Plain
    optim: Plain
    protect: tuple[str, ...] = ()
    kept: tuple[float, float] = (75, 50)


def models(hidden: tuple[int, ...], dropout: float) -> dict[str, Plain]:
    """DeepFM and DCNv2 with rows of ``WIDTH`` columns; DeepFM's hold a first-order weight, too."""
    mlp = small_mlp(hidden, dropout)
    return {
        "deepfm": {"name": "deepfm", "dim": WIDTH - 1, "mlp": mlp},
        "dcnv2": {"name": "dcnv2", "dim": WIDTH, "layers": 2, "cross": "low_rank", "mlp": mlp},
    }


def optimizers(dense: Plain, tables: Plain) -> Plain:
    """Row-wise Adagrad for the tables."""
    return {"dense": dense, "tables": {"name": "rowwise_adagrad", **tables}}


SMALL = optimizers(ADAMW, {"lr": 0.005, "init_scale": 1e-3})
TASKS: dict[str, Task] = {
    "criteo": Task("criteo-tuning", models((64, 32), 0.2), {"epochs": 2, "batch_size": 256}, SMALL),
    "avazu": Task("avazu-tuning", models((64, 32), 0.2), {"epochs": 2, "batch_size": 128}, SMALL),
    "kuairand": Task(
        "kuairand-tuning",
        models((64, 32), 0.2),
        {"epochs": 2, "batch_size": 256},
        optimizers(ADAMW, {"lr": 0.03, "init_scale": 1e-3}),
        ("video_id", "user_id"),
        (99.7, 99.6),
    ),
    "completejourney": Task(
        "completejourney",
        models((128, 64), 0.1),
        {"epochs": 1, "batch_size": 2048, "max_steps": 100},
        optimizers(**JOURNEY),
        ("product", "history"),
        (95, 90),
    ),
}


@dataclass(frozen=True)
class Way:
    """What is done to the rows.

    Attributes:
        tiers: settings of tiers; empty for fp32. A way's name as budget is what the same run took in that way.
        prune: which of ``Task.kept`` the fields are pruned to; -1 for none.
        random: whether rows have priorities by chance.
    """

    tiers: Plain
    prune: int = -1
    random: bool = False


POLICY: Plain = {"flat_below_bytes": 0, "rebalance_every": 20, "sweep_every": 8}
DEEP = ("fp32", "fp16", "int8", "int4")
ALL = (*DEEP, "dropped")


def tiers(budget: str, levels: Sequence[str], **other: float) -> Plain:
    """Settings of tiers in which every table takes part, at the pace of runs of some hundred steps."""
    return {**POLICY, "budget": budget, "levels": list(levels), **other}


WAYS: dict[str, Way] = {
    "fp32": Way({}),
    "fp16": Way(tiers("100%", ["fp16"])),
    "int8": Way(tiers("100%", ["int8"])),
    "int4": Way(tiers("100%", ["int4"])),
    "tiers 40%": Way(tiers("40%", DEEP[:3])),
    "tiers as int8": Way(tiers("int8", DEEP)),
    "tiers as int4": Way(tiers("int4", ALL)),
    "tiers 15%": Way(tiers("15%", ALL)),
    "tiers 15%, labels not weighed": Way(tiers("15%", ALL, positive_weight=1.0)),
    "tiers 15%, random": Way(tiers("15%", ALL), random=True),
    DROPS[0]: Way(tiers("30%", DEEP), prune=0),
    DROPS[1]: Way(tiers("15%", ALL), prune=1),
}


@dataclass(frozen=True)
class Run:
    """One run's outcome.

    Attributes:
        task, model, way, seed, split: which run it is.
        share: bytes in use at the end over fp32 bytes.
        rows: at the end, by tier; empty without tiers.
        dropped: fields.
        seconds: wall-clock, evaluation included.
    """

    task: str
    model: str
    way: str
    seed: int
    split: str
    auc: float
    share: float
    rows: dict[str, int]
    dropped: tuple[str, ...]
    steps: int
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """Which run it is."""
        return (self.task, self.model, self.way, self.seed, self.split)


class Capture(Callback):
    """Keeps the last evaluation."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def on_eval(self, record: EvalRecord) -> None:
        self.metrics = record.metrics


class ByChance(Callback):
    """Gives every row a priority that does not depend on the data: log-normal, drawn once."""

    def __init__(self, tables: Sequence[TieredTable], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._drawn = [(table, torch.exp(2.0 * torch.randn(table.rows, generator=generator))) for table in tables]

    def on_step(self, record: StepRecord) -> None:
        for table, priority in self._drawn:
            seen = table.tier_of() != Tier.NONE
            table.stat[:, 1] = torch.where(seen, priority * table.gain, 0.0)


def configured(task: Task, model: str, way: Way, seed: int, split: str, share: float) -> Plain:
    """What a run file would say.

    Args:
        share: of the way whose name the budget is.
    """
    steps = steps_of(task)
    values: Plain = {
        "name": "compression",
        "seed": seed,
        "model": task.models[model],
        "data": {"path": str(CACHE / task.data), "valid": "valid", "test": split},
        "train": {**task.train, "log_every": 10},
        "optim": task.optim,
        "eval": {"every_steps": NEVER, "batch_size": 4096, "max_rows": 20_000},
        "sharding": {"measure_rows": 0},
        "tensorboard": False,
    }
    if way.tiers:
        budget = f"{100 * share:.3f}%" if way.tiers["budget"] in WAYS else way.tiers["budget"]
        values["tiers"] = {**way.tiers, "budget": budget}
    if way.prune >= 0:
        every = max(steps // 10, 1)
        values["fields"] = {
            "score_every": every,
            "start_after": 2 * every,
            "rounds": 100,
            "bytes_per_round": f"{(100 - task.kept[way.prune]) / ROUNDS:g}%",
            "tolerance": 1.0,
            "budget": f"{task.kept[way.prune]:g}%",
            "protect": task.protect,
        }
    return values


def steps_of(task: Task) -> int:
    """Steps of a run."""
    rows = dataset(task.data).split("train").rows
    return min(
        int(task.train["epochs"] * rows) // int(task.train["batch_size"]), int(task.train.get("max_steps", rows))
    )


def trained(name: str, model: str, way: str, seed: int, split: str, share: float) -> Run:
    """Trains and measures; ``share`` is that of the way whose name the budget is."""
    start = time.perf_counter()
    task, found, capture = TASKS[name], dataset(TASKS[name].data), Capture()
    with tempfile.TemporaryDirectory(prefix="thresher-compression-") as folder:
        values = {**configured(task, model, WAYS[way], seed, split, share), "run_dir": folder}
        config = parse(RunConfig, values, "benchmarks.compression")
        parts = assemble(config, WORLD, found)
        parts.folder.create()
        callbacks: list[Callback] = [capture]
        if WAYS[way].random:
            callbacks.append(ByChance(parts.sharded.tiers.tables if parts.sharded.tiers else (), seed))
        steps = total_steps(config, found.split("train").rows)
        Training(parts, steps, callbacks).run(TrainState())
    taken, rows = bytes_and_rows(parts)
    gone = (
        () if parts.fields is None else tuple(parts.fields.pruner.fields[n].name for n in parts.fields.pruner.dropped)
    )
    return Run(
        name, model, way, seed, split, capture.metrics["auc"], taken, rows, gone, steps, time.perf_counter() - start
    )


def bytes_and_rows(parts: Parts) -> tuple[float, dict[str, int]]:
    """Share of the fp32 bytes in use, and rows by tier."""
    if parts.sharded.tiers is None:
        return 1.0, {}
    books = parts.sharded.tiers.ledger()
    rows = {tier.name.lower(): count for tier, count in zip(Tier, books.rows, strict=True)}
    return books.live_bytes / books.fp32_bytes, rows


class Book:
    """Runs done, in a file of JSON lines where there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        read = [json.loads(line) for line in lines]
        self._runs = {run.key: run for run in (Run(**{**line, "dropped": tuple(line["dropped"])}) for line in read)}

    def run(self, name: str, model: str, way: str, seed: int, split: str) -> Run:
        """The run, trained if it is not there. With a budget as of another way, that one is before it."""
        key = (name, model, way, seed, split)
        if key not in self._runs:
            like = WAYS[way].tiers.get("budget", "")
            share = self.run(name, model, like, seed, split).share if like in WAYS else 1.0
            self._add(trained(name, model, way, seed, split, share))
        return self._runs[key]

    def found(self, name: str, model: str, way: str, seeds: int, split: str) -> list[Run]:
        """The runs of all seeds; none where one is missing."""
        keys = [(name, model, way, seed, split) for seed in range(seeds)]
        return [self._runs[key] for key in keys] if all(key in self._runs for key in keys) else []

    def _add(self, run: Run) -> None:
        self._runs[run.key] = run
        print(f"{run.key} auc {run.auc:.4f} share {run.share:.3f} {run.seconds:.1f} s", file=sys.stderr, flush=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")


def outcome(runs: Sequence[Run], plain: Sequence[Run]) -> Plain:
    """Of one way: AUC, bytes, and what was lost against fp32 with the same seed."""
    last = runs[-1]
    return {
        "auc": summary([run.auc for run in runs]),
        "drop": summary([base.auc - run.auc for run, base in zip(runs, plain, strict=True)]),
        "share": statistics.mean(run.share for run in runs),
        "rows": last.rows,
        "dropped": [list(run.dropped) for run in runs],
        "steps": last.steps,
        "seconds": statistics.mean(run.seconds for run in runs),
    }


def train_all(book: Book, chosen: argparse.Namespace, seeds: int) -> None:
    """Seeds are the outer loop: what is done first is a whole picture."""
    for seed in range(seeds):
        for name in chosen.data:
            for model in chosen.models:
                for way in ("fp32", *chosen.ways):
                    book.run(name, model, way, seed, chosen.split)


def results_of(book: Book, split: str, seeds: int) -> dict[str, Plain]:
    """Results by data set, model and way, of all that the book has with all seeds."""
    results: dict[str, Plain] = {}
    for name, task in TASKS.items():
        for model in task.models:
            plain = book.found(name, model, "fp32", seeds, split)
            for way in WAYS:
                runs = book.found(name, model, way, seeds, split)
                if runs and plain:
                    results.setdefault(name, {}).setdefault(model, {})[way] = outcome(runs, plain)
    return results


def plot(results: Mapping[str, Plain], path: Path) -> None:
    """Drop of AUC over the share of bytes, a column a data set and a row a model; bars reach over seeds.

    Ablations, whose names have a comma, are left to the table.
    """
    figure, axes = pyplot.subplots(2, len(results), figsize=(4.4 * len(results), 8.2), squeeze=False)
    for column, (name, by_model) in enumerate(results.items()):
        for row, (model, found) in enumerate(by_model.items()):
            _panel(axes[row][column], f"{name}, {model}", found)
    shown = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="lower center", ncol=5, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _panel(axis: Axes, title: str, found: Mapping[str, Plain]) -> None:
    plain = found["fp32"]["auc"]
    half = plain["spread"] / 2
    axis.axhspan(-half, half, color="grey", alpha=0.15, label="spread of fp32 over seeds")
    for number, way in enumerate(way for way in WAYS if "," not in way and way != "fp32"):
        if way in found:
            drop, share = found[way]["drop"], 100 * found[way]["share"]
            error = [[drop["mean"] - drop["min"]], [drop["max"] - drop["mean"]]]
            marker = "s" if len(WAYS[way].tiers["levels"]) == 1 else "o" if WAYS[way].prune < 0 else "D"
            axis.errorbar(share, drop["mean"], error, marker=marker, label=way, color=f"C{number}", capsize=2, ls="")
    axis.set_title(f"{title}: AUC of fp32 {plain['mean']:.4f}", fontsize=10)
    axis.set_xlabel("bytes in use, % of fp32 with optimizer state")
    axis.set_ylabel("AUC lost against fp32")
    axis.grid(alpha=0.3)


def rows_of(results: Mapping[str, Plain]) -> list[list[object]]:
    """The table: a line a data set, model and way."""
    return [
        [
            f"{name} {model} {way}",
            f"{one['share']:.1%}",
            f"{one['auc']['mean']:.4f}",
            f"{one['auc']['spread']:.4f}",
            f"{one['drop']['mean']:+.4f}",
            f"{one['drop']['min']:+.4f} .. {one['drop']['max']:+.4f}",
        ]
        for name, by_model in results.items()
        for model, ways in by_model.items()
        for way, one in ways.items()
    ]


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("compression: AUC against bytes of the tables")
    parser.add_argument("--data", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--models", nargs="*", choices=["deepfm", "dcnv2"], default=["deepfm", "dcnv2"])
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=0, help="default 3; 1 with --quick")
    parser.add_argument("--split", choices=["valid", "test"], default="test", help="settings were chosen on valid")
    parser.add_argument("--runs", type=Path, default=None, metavar="PATH", help="runs done; they are not done again")
    parser.add_argument("--plot", type=Path, default=None, metavar="PATH", help="write a picture there")
    given = parser.parse_args()
    chosen = measure.options(given)
    torch.set_num_threads(1)
    seeds = given.seeds or (1 if chosen.quick else 3)
    book = Book(given.runs)
    with one_rank():
        train_all(book, given, seeds)
    results = results_of(book, given.split, seeds)
    if given.plot is not None:
        plot(results, given.plot)
    head = ["data, model, way", "bytes", "AUC", "spread", "drop", "drop over seeds"]
    measure.report(f"AUC against bytes, {seeds} seeds", head, rows_of(results), {"seeds": seeds, **results}, chosen)


if __name__ == "__main__":
    main()
