"""Which fields can go: AUC against the fields that are kept, by the score that ranks them, and what a score costs.

``python -m benchmarks.fields [--data NAME ...] [--seeds N] [--quick] [--json PATH] [--plot PATH]``

A DeepFM is trained once a seed. Its fields are ranked by F-Permutation's score (a by-product of that training), by
permutation importance (loss on the validation part when a field is shuffled, three shuffles each), by the norm of the
gradient, and by chance. Then the least important fields are left out, and

* ``retrained``: a model without them is trained from scratch and measured on the test part;
* ``pruned``: the same model is measured with their vectors replaced by their means, without further training.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from scipy.stats import spearmanr

from benchmarks import measure
from benchmarks.ctr.contestants import one_rank
from benchmarks.datasets import CACHE, dataset
from benchmarks.quality import ADAMW, WORLD, Plain, small_mlp
from benchmarks.summary import summary
from thresher.data.batch import Batch
from thresher.embeddings.fields.baselines import Change, GradientNorms, permutation_importance, random_scores
from thresher.embeddings.fields.config import FieldConfig
from thresher.embeddings.fields.pruning import FieldPruner
from thresher.embeddings.fields.tap import attach
from thresher.settings import parse
from thresher.trainer.assemble import Parts, assemble, total_steps
from thresher.trainer.callbacks.base import Callback, EvalRecord
from thresher.trainer.run import Training
from thresher.trainer.state import TrainState
from thresher.zoo.registry import RunConfig

SETS = ("criteo-tuning", "avazu-tuning")
METHODS = ("taylor", "permutation", "gradient norm", "random")
SHARES = (1.0, 0.75, 0.5, 0.35, 0.2, 0.1)
"""Shares of the fields that are kept."""
REPEATS = 3
FOREVER = 1 << 30
SETTINGS: Plain = {
    "model": {"name": "deepfm", "dim": 8, "mlp": small_mlp((64, 32), 0.3)},
    "train": {"epochs": 3, "batch_size": 256},
    "optim": {"dense": ADAMW, "tables": {"lr": 0.005, "init_scale": 1e-3}},
}


class Capture(Callback):
    """Keeps the last evaluation."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def on_eval(self, record: EvalRecord) -> None:
        self.metrics = record.metrics


@dataclass(frozen=True)
class Trained:
    """A model after its last step; AUC on the test part."""

    parts: Parts
    auc: float


def train(data: str, seed: int, features: Sequence[str], scored: bool) -> Trained:
    """Trains on one rank. ``features`` are the fields that the model reads; none for all."""
    found = dataset(data)
    dense = [feature.name for feature in found.schema.dense]
    with tempfile.TemporaryDirectory(prefix="thresher-fields-") as folder:
        values = {
            **SETTINGS,
            "name": "fields",
            "run_dir": folder,
            "seed": seed,
            "data": {"path": str(CACHE / data), "valid": "", "test": "test"},
            "fields": {"score_every": FOREVER if scored else 0, "look_every": 1},
            "tensorboard": False,
        }
        if features:
            values["model"] = {**SETTINGS["model"], "features": [*features, *dense]}
        config = parse(RunConfig, values, "benchmarks.fields")
        parts = assemble(config, WORLD, found)
        parts.folder.create()
        capture = Capture()
        Training(parts, total_steps(config, found.split("train").rows), [capture]).run(TrainState())
    return Trained(parts, capture.metrics["auc"])


def rankings(trained: Trained, seed: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Scores of the fields by method, and the seconds that each took beside the training."""
    parts = trained.parts
    assert parts.fields is not None
    names = [field.name for field in parts.fields.pruner.fields]
    parts.sharded.set_table_lr(0.0)
    work: dict[str, Callable[[], Sequence[float]]] = {
        "taylor": lambda: parts.fields.scores().score.tolist() if parts.fields else [],
        "permutation": lambda: permutation(parts, names, seed),
        "gradient norm": lambda: gradient_norms(parts),
        "random": lambda: random_scores(parts.fields.pruner.fields, seed) if parts.fields else [],
    }
    found, seconds = {}, {}
    for method, run in work.items():
        start = time.perf_counter()
        found[method] = dict(zip(names, run(), strict=True))
        seconds[method] = time.perf_counter() - start
    return found, seconds


def permutation(parts: Parts, names: Sequence[str], seed: int) -> list[float]:
    """Rise of the mean loss on the validation part."""
    with closing(parts.split_reader("valid")) as reader:
        batches = list(reader.sweep())

    @torch.no_grad()
    def quality(change: Change) -> float:
        parts.sharded.wrapped.eval()
        total = sum(
            float(loss_of(parts, replace(batch, sparse=change(batch.sparse)))) * batch.size for batch in batches
        )
        return -total / sum(float(batch.weight.sum()) for batch in batches)

    return permutation_importance(names, quality, REPEATS, seed)


def gradient_norms(parts: Parts) -> list[float]:
    """Over the training part, weights standing still."""
    assert parts.fields is not None
    norms = GradientNorms(parts.fields.pruner.fields)
    detach = attach(parts.fields.collections, FieldPruner(parts.fields.pruner.fields, parts.world.device), norms)
    parts.sharded.wrapped.eval()
    with closing(parts.split_reader("train")) as reader:
        for batch in reader.sweep():
            loss_of(parts, batch).backward()  # type: ignore[no-untyped-call]
            parts.sharded.step_tables()
    detach()
    return norms.scores()


def loss_of(parts: Parts, batch: Batch) -> torch.Tensor:
    """The model's loss."""
    return parts.model.loss(parts.sharded.wrapped(batch), batch)


def pruned_auc(parts: Parts, kept: Sequence[str]) -> float:
    """AUC on the test part with all fields but ``kept`` at their means."""
    assert parts.fields is not None
    pruner = parts.fields.pruner
    gone = [number for number, field in enumerate(pruner.fields) if field.name not in kept]
    pruner.drop(gone, parts.fields.means(), 0)
    with closing(parts.split_reader("test")) as reader:
        found = parts.evaluator().run(reader, "test", 0).metrics["auc"]
    pruner.restore(gone)
    return found


def best(scores: Mapping[str, float], share: float) -> tuple[str, ...]:
    """The ``share`` of fields with the highest scores, at least one."""
    ranked = sorted(scores, key=lambda name: -scores[name])
    return tuple(ranked[: max(round(share * len(ranked)), 1)])


def one_seed(data: str, seed: int, shares: Sequence[float], memory: dict[frozenset[str], float]) -> Plain:
    """AUC by method and share, the agreement of rankings with permutation, and seconds.

    Args:
        memory: AUC of models trained with this seed already, by their fields.
    """
    trained = train(data, seed, (), scored=True)
    scores, seconds = rankings(trained, seed)
    fields = len(scores["taylor"])
    found: Plain = {"fields": fields, "seconds": seconds, "spearman": {}, "retrained": {}, "pruned": {}}
    memory[frozenset(scores["taylor"])] = trained.auc
    for method, values in scores.items():
        agreement = spearmanr(list(values.values()), list(scores["permutation"].values())).statistic
        found["spearman"][method] = float(agreement)
        kept = [best(values, share) for share in shares]
        found["pruned"][method] = [pruned_auc(trained.parts, names) for names in kept]
        for names in kept:
            if frozenset(names) not in memory:
                memory[frozenset(names)] = train(data, seed, names, scored=False).auc
        found["retrained"][method] = [memory[frozenset(names)] for names in kept]
    return found


def over_seeds(data: str, seeds: int, shares: Sequence[float]) -> Plain:
    """Mean, smallest, largest and spread over seeds, and the mean over shares of the mean."""
    runs = [one_seed(data, seed, shares, {}) for seed in range(seeds)]
    curves: Plain = {"fields": runs[0]["fields"], "shares": list(shares), "seeds": seeds}
    for how in ("retrained", "pruned"):
        curves[how] = {}
        for method in METHODS:
            points = [summary([run[how][method][n] for run in runs]) for n in range(len(shares))]
            area = sum(point["mean"] for point in points) / len(points)
            curves[how][method] = {"points": points, "area": area}
    for figure in ("spearman", "seconds"):
        curves[figure] = {method: summary([run[figure][method] for run in runs]) for method in METHODS}
    return curves


def step_cost(repetitions: int) -> Plain:
    """Thread-CPU seconds of a training step of the default DeepFM (16 factors, 3 x 400) on 4,096 rows of Criteo, with
    a look at it and without, interleaved. One model takes both: it looks at every step after the first."""
    values = {
        "name": "cost",
        "model": {"name": "deepfm"},
        "train": {"batch_size": 4096},
        "data": {"path": str(CACHE / "criteo"), "valid": "", "test": ""},
        "fields": {"score_every": FOREVER, "start_after": 1, "look_every": 1},
    }
    parts = assemble(parse(RunConfig, values, "benchmarks.fields"), WORLD, dataset("criteo"))
    with closing(parts.training_reader()) as reader:
        stream = reader.stream(0)
        batches = [next(stream) for _ in range(4)]
    stepper, turns = parts.stepper(), iter(range(FOREVER))

    def step(done: int) -> None:
        assert parts.fields is not None
        parts.fields.after_step(done, FOREVER, _never)
        stepper.step([batches[next(turns) // 2 % len(batches)]], 0)

    timings = measure.interleaved({"plain": partial(step, 0), "scored": partial(step, 1)}, repetitions, warm_up=10)
    return {
        "plain_ms": timings["plain"].median_s * 1e3,
        "scored_ms": timings["scored"].median_s * 1e3,
        "cost_of_a_look": 1.0 / measure.ratio(timings["scored"], timings["plain"]) - 1.0,
        "look_every": FieldConfig().look_every,
        "fields": len(parts.dataset.schema.sparse),
    }


def _never(step: int) -> EvalRecord:
    raise AssertionError("nothing is dropped here")


def plot(results: Mapping[str, Plain], path: Path) -> None:
    """AUC over the share of fields kept: retrained above, pruned below, a column a data set."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(5.2 * len(results), 7.2), squeeze=False, sharey="col")
    for column, (data, curves) in enumerate(results.items()):
        for row, how in enumerate(("retrained", "pruned")):
            axis = axes[row][column]
            for method in METHODS:
                points = curves[how][method]["points"]
                means = [point["mean"] for point in points]
                axis.plot(curves["shares"], means, marker="o", label=method)
                low, high = [p["min"] for p in points], [p["max"] for p in points]
                axis.fill_between(curves["shares"], low, high, alpha=0.15)
            axis.set_title(f"{data}: {how}")
            axis.set_xlabel("share of fields kept")
            axis.set_ylabel("AUC, test part")
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("fields: AUC against fields kept, and the cost of scores")
    parser.add_argument("--data", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=0, help="default 3; 1 with --quick")
    parser.add_argument("--plot", type=Path, default=None, metavar="PATH", help="write a picture there")
    given = parser.parse_args()
    chosen = measure.options(given)
    torch.set_num_threads(1)
    seeds = given.seeds or (1 if chosen.quick else 3)
    shares = SHARES[::2] if chosen.quick else SHARES
    with one_rank():
        cost = step_cost(20 if chosen.quick else 60)
        curves = {data: over_seeds(data, seeds, shares) for data in given.data}
    rows: list[list[object]] = [
        [f"{data} {how} {method}", found[how][method]["area"], *(p["mean"] for p in found[how][method]["points"])]
        for data, found in curves.items()
        for how in ("retrained", "pruned")
        for method in METHODS
    ]
    for data, found in curves.items():
        for method in METHODS:
            spent = f"{found['seconds'][method]['mean']:.2g} s"
            agreement = found["spearman"][method]["mean"]
            rows.append([f"{data} agreement with permutation: {method}", agreement, spent, *[""] * (len(shares) - 1)])
    rows.append(["a look's share of a DeepFM step", cost["cost_of_a_look"], *[""] * len(shares)])
    if given.plot is not None:
        plot(curves, given.plot)
    head = ["data, model, ranking", "mean AUC", *(f"{share:.0%} kept" for share in shares)]
    measure.report(f"Fields, {seeds} seeds", head, rows, {"curves": curves, "step": cost}, chosen)


if __name__ == "__main__":
    main()
