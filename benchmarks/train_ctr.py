"""A training step of LR, DeepFM and DCN V2 beside FuxiCTR 2.3.10 and torch's SparseAdam.

``python -m benchmarks.train_ctr [--quick] [--json PATH]``

One process, one thread, data in memory: 26 tables of equal size, one id each, 13 floats, embeddings of 16, the same
hidden layers. A step is forward, loss, backward and update, gradients clipped at norm 10 (FuxiCTR's default). The
contestants take their steps in turn; medians of CPU seconds of the whole process and of wall seconds, ratios of the two
steps of one round.

FuxiCTR's wheel holds its layers and its base class with the training step; these three models stand only in its
repository (the wheel's DCNv2 is one for long sequences), so they are put together from its layers. The models differ
where the projects do: FuxiCTR embeds each float (a [1, 16] matrix), our DCN V2 takes floats as they are, so its input
is narrower. The update rules differ too: FuxiCTR's Adam moves every row of every table, SparseAdam and our row-wise
Adagrad the rows of the batch. So AUCs stand beside the times: :mod:`benchmarks.auc_ctr`.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import measure
from benchmarks.ctr.contestants import NAMES, Contestant, Task, contestant, one_rank
from benchmarks.ctr.rows import Rows, synthetic

MODELS = ("lr", "deepfm", "dcnv2")
TABLE_ROWS = {"small": 10_000, "1m": 1_000_000, "4m": 4_000_000}
BATCHES = (1024, 4096)
HIDDEN = (64, 64, 64)
"""FuxiCTR's default."""
GIVEN = 4
"""Different batches; they take turns."""


class Timed:
    """A contestant whose steps are timed by two clocks."""

    def __init__(self, who: Contestant, rows: Rows, size: int) -> None:
        self.who = who
        self.given = [who.give(part) for part in rows.batches(size, torch.arange(len(rows)))]
        self.walls: list[float] = []

    def step(self) -> float:
        """CPU seconds of a step; its wall seconds are kept."""
        number = len(self.walls)
        given = self.given[number % len(self.given)]
        wall, cpu = time.perf_counter(), time.process_time()
        self.who.step(given, number)
        spent = time.process_time() - cpu
        self.walls.append(time.perf_counter() - wall)
        return spent


def steps(task: Task, total_rows: int, size: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step of each contestant, and how many times faster ours is."""
    rows = synthetic(total_rows, size * GIVEN, seed=0)
    timed = {name: Timed(contestant(name, task, rows.schema, seed=0), rows, size) for name in NAMES}
    warm_up = 2
    cpu = measure.interleaved_seconds({name: one.step for name, one in timed.items()}, repetitions, warm_up)
    wall = {name: measure.Timing(tuple(one.walls[warm_up:])) for name, one in timed.items()}
    found: dict[str, Any] = {"rows": total_rows, "batch_size": size}
    for name in NAMES:
        found[name] = {"cpu_ms": cpu[name].median_s * 1e3, "wall_ms": wall[name].median_s * 1e3}
    for name in NAMES[1:]:
        found[f"times_{name}"] = measure.ratio(cpu["ours"], cpu[name])
        found[f"times_{name}_wall"] = measure.ratio(wall["ours"], wall[name])
    return found


def step_rows(found: Mapping[str, Mapping[str, Any]]) -> list[list[object]]:
    """The table of all steps, ratio first."""
    return [
        [name, one["times_fuxictr"], one["times_fuxictr_wall"], one["times_sparse_adam"]]
        + [one[who]["cpu_ms"] for who in NAMES]
        for name, one in found.items()
    ]


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("train_ctr: a training step beside FuxiCTR")
    chosen = measure.options(parser.parse_args())
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with one_rank():
        for model in MODELS:
            for label, total in TABLE_ROWS.items():
                for size in BATCHES:
                    repetitions = (5 if total > 100_000 else 9) if chosen.quick else 15
                    found[f"{model}_{label}_b{size}"] = steps(Task(model, hidden=HIDDEN), total, size, repetitions)
    results: dict[str, Any] = {"steps": found, "slowest": slowest(found)}
    columns = ["model_rows_batch", "x FuxiCTR (CPU)", "x FuxiCTR (wall)", "x SparseAdam", *(f"{n} ms" for n in NAMES)]
    measure.report("A training step; ours is so many times faster", columns, step_rows(found), results, chosen)


def slowest(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The smallest and the median ratio to FuxiCTR, for each number of table rows."""
    ratios = {
        label: [one["times_fuxictr"] for name, one in found.items() if f"_{label}_" in name] for label in TABLE_ROWS
    }
    return {f"min_{label}": min(values) for label, values in ratios.items()} | {
        f"median_{label}": statistics.median(values) for label, values in ratios.items()
    }


if __name__ == "__main__":
    main()
