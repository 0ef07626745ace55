"""One rank of a training run.

Started by ``thresher train``, or by torchrun on any number of machines::

    torchrun --nproc-per-node 4 -m thresher.launch.worker CONFIG [a.b=c ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from thresher.errors import ConfigError
from thresher.launch.place import Place
from thresher.launch.rank import live


def train(place: Place, arguments: Sequence[str]) -> None:
    """Trains the configuration file ``arguments[0]`` with the overrides that follow it, on this rank.

    Raises:
        ThresherError: the configuration, the data, the plan or a checkpoint is not usable.
    """
    if not arguments:
        raise ConfigError(
            "no configuration file is given",
            where="command line",
            fix="use 'thresher.launch.worker CONFIG [a.b=c ...]'",
        )
    # Imported here, where logs are open and a failing import is reported like any other failure.
    from thresher.launch.group import check_batches, joined
    from thresher.trainer.config import load_config
    from thresher.trainer.run import train as train_run
    from thresher.versions import check_installed
    from thresher.zoo.registry import RunConfig

    check_installed()
    config = load_config(RunConfig, Path(arguments[0]), tuple(arguments[1:]))
    check_batches(config.train, place.world, config.pipeline)
    with joined(place, config.launch) as world:
        train_run(config, world)


if __name__ == "__main__":
    live(lambda place: train(place, sys.argv[1:]))
