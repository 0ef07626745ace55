"""Held-out quality on real data through the real trainer, over seeds.

``python -m benchmarks.quality [--data NAME ...] [--models NAME ...] [--seeds N] [--quick] [--json PATH]``

Every model trains on one rank with the settings below, which were chosen on validation parts (``criteo-tuning`` for
Criteo), and is measured once on the test part. A seed sets the initial weights and the order of the rows.
"""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import measure
from benchmarks.ctr.contestants import one_rank
from benchmarks.datasets import CACHE, dataset
from benchmarks.summary import summary
from thresher.settings import parse
from thresher.trainer.assemble import assemble, total_steps
from thresher.trainer.callbacks.base import Callback, EvalRecord
from thresher.trainer.run import Training
from thresher.trainer.state import TrainState
from thresher.trainer.world import World
from thresher.zoo.registry import RunConfig

Plain = dict[str, Any]
WORLD = World(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def settings(model: Plain, epochs: float, batch: int, dense: Plain, tables: Plain) -> Plain:
    """What a run file would say."""
    return {
        "model": model,
        "train": {"epochs": epochs, "batch_size": batch},
        "optim": {"dense": dense, "tables": tables},
    }


def small_mlp(hidden: tuple[int, ...], dropout: float) -> Plain:
    """A perceptron with dropout."""
    return {"hidden": list(hidden), "dropout": dropout}


ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}
JOURNEY = {"dense": {"lr": 1e-3}, "tables": {"lr": 0.02, "init_scale": 0.01}}
RUNS: dict[str, dict[str, Plain]] = {
    "criteo": {
        "lr": settings({"name": "lr"}, 4, 256, {"lr": 3e-3}, {"lr": 0.01, "init_scale": 1e-4}),
        "fm": settings({"name": "fm", "dim": 4}, 3, 256, {"lr": 1e-3}, {"lr": 0.006, "init_scale": 0.01}),
        "deepfm": settings(
            {"name": "deepfm", "dim": 8, "mlp": small_mlp((64, 32), 0.3)},
            3,
            256,
            ADAMW,
            {"lr": 0.005, "init_scale": 1e-3},
        ),
        "dcnv2": settings(
            {"name": "dcnv2", "dim": 8, "layers": 2, "mlp": small_mlp((64, 32), 0.2)},
            2,
            256,
            ADAMW,
            {"lr": 0.01, "init_scale": 0.01},
        ),
    },
    "ml100k": {
        "lr": settings({"name": "lr"}, 6, 256, {"lr": 3e-3}, {"lr": 0.05, "init_scale": 1e-4}),
        "fm": settings({"name": "fm"}, 3, 256, {"lr": 1e-3}, {"lr": 0.04, "init_scale": 1e-3}),
        "deepfm": settings(
            {"name": "deepfm", "mlp": small_mlp((64, 64, 64), 0.2)},
            3,
            256,
            {"lr": 1e-3},
            {"lr": 0.04, "init_scale": 1e-3},
        ),
        "dcnv2": settings(
            {"name": "dcnv2", "mlp": small_mlp((64, 64, 64), 0.2)},
            3,
            256,
            {"lr": 1e-3},
            {"lr": 0.02, "init_scale": 1e-3},
        ),
    },
    "completejourney": {
        "lr": settings({"name": "lr"}, 2, 4096, {"lr": 3e-3}, {"lr": 0.02, "init_scale": 1e-4}),
        "fm": settings({"name": "fm"}, 2, 4096, **JOURNEY),
        "deepfm": settings({"name": "deepfm", "mlp": small_mlp((128, 64), 0.1)}, 2, 4096, **JOURNEY),
        "dlrm": settings({"name": "dlrm"}, 2, 4096, **JOURNEY),
        "dcnv2": settings({"name": "dcnv2", "layers": 2, "mlp": small_mlp((128, 64), 0.1)}, 2, 4096, **JOURNEY),
        "din": settings({"name": "din"}, 1, 4096, **JOURNEY),
    },
    "completejourney-next": {
        "sasrec": settings({"name": "sasrec"}, 3, 512, {"lr": 1e-3}, {"lr": 0.05}),
    },
}
"""By data set and model. On Criteo's 24 thousand rows everything overfits within a few passes, so they are few."""


class Capture(Callback):
    """Keeps the last evaluation."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def on_eval(self, record: EvalRecord) -> None:
        self.metrics = record.metrics


def trained(data: str, values: Plain, seed: int, split: str = "test", max_steps: int = 0) -> dict[str, float]:
    """Metrics on ``split`` after training on a prepared set."""
    found = dataset(data)
    capture = Capture()
    with tempfile.TemporaryDirectory(prefix="thresher-quality-") as folder:
        whole = {
            **values,
            "name": "quality",
            "run_dir": folder,
            "seed": seed,
            "data": {"path": str(CACHE / data), "valid": "", "test": split},
            "train": {**values["train"], "max_steps": max_steps},
            "tensorboard": False,
        }
        config = parse(RunConfig, whole, "benchmarks.quality")
        parts = assemble(config, WORLD, found)
        parts.folder.create()
        steps = total_steps(config, found.split(config.data.train).rows)
        Training(parts, steps, [capture]).run(TrainState())
    return capture.metrics


def over_seeds(data: str, values: Plain, seeds: int, max_steps: int) -> Plain:
    """Mean, smallest, largest and spread of each metric over seeds."""
    found = [trained(data, values, seed, max_steps=max_steps) for seed in range(seeds)]
    return {name.replace("@", "_"): summary([one[name] for one in found]) for name in found[0]}


def gains(models: Mapping[str, Plain]) -> dict[str, float]:
    """How far each model's worst seed is above the best seed of ``lr``."""
    if "lr" not in models:
        return {}
    best = models["lr"]["auc"]["max"]
    return {name: found["auc"]["min"] - best for name, found in models.items() if name != "lr"}


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("quality: held-out metrics over seeds")
    parser.add_argument("--data", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--models", nargs="*", default=[], help="all by default")
    parser.add_argument("--seeds", type=int, default=0, help="default 3; 1 with --quick")
    given = parser.parse_args()
    chosen = measure.options(given)
    torch.set_num_threads(1)
    seeds = given.seeds or (1 if chosen.quick else 3)
    results: Plain = {}
    rows: list[list[object]] = []
    with one_rank():
        for data in given.data:
            runs = {model: values for model, values in RUNS[data].items() if not given.models or model in given.models}
            models = {model: over_seeds(data, values, seeds, 0) for model, values in runs.items()}
            results[data] = {"seeds": seeds, **models, "gain_over_lr": gains(models)}
            rows += [
                [f"{data} {model}", metric, one["mean"], one["spread"]]
                for model, metrics in models.items()
                for metric, one in metrics.items()
            ]
    measure.report(
        f"Held-out quality, {seeds} seeds", ["data, model", "metric", "mean", "spread"], rows, results, chosen
    )


if __name__ == "__main__":
    main()
