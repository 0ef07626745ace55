"""One rank of an evaluation: ``python -m thresher.launch.eval_worker RUN_DIR SPLIT STEP``, under torchrun as well."""

import sys
from collections.abc import Sequence
from pathlib import Path

from thresher.errors import ConfigError
from thresher.launch.place import Place
from thresher.launch.rank import live


def evaluate(place: Place, arguments: Sequence[str]) -> None:
    """Measures the run in the folder ``arguments[0]``; rank 0 prints each metric on a line of its own.

    Args:
        arguments: the run's folder; the split, empty for the run's ``data.test``, or its ``data.valid`` where there
            is no test split; the step of a checkpoint, -1 for the best one with early stopping, else the newest.

    Raises:
        ConfigError: the folder is no run directory, or the run has no held-out split.
        ThresherError: data or checkpoint are not usable.
    """
    from thresher.launch.group import joined
    from thresher.launch.local import run_config
    from thresher.trainer.run import evaluate as evaluate_run
    from thresher.versions import check_installed

    check_installed()
    folder, step = Path(arguments[0]), int(arguments[2])
    config = run_config(folder)
    split = arguments[1] or config.data.test or config.data.valid
    if not split:
        raise ConfigError("the run has no held-out split", where=str(folder), fix="name one with --split")
    with joined(place, config.launch) as world:
        record = evaluate_run(folder, config, split, step, world)
    if place.rank == 0:
        print(f"{folder}, step {record.step:,}, split '{record.split}', {record.rows:,} rows, {record.seconds:.1f} s")
        for name, value in record.metrics.items():
            print(f"  {name:<20} {value:.6g}")


if __name__ == "__main__":
    live(lambda place: evaluate(place, sys.argv[1:]))
