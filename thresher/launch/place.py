"""Where this process stands in a run: read from the environment that a launcher sets. Light: imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from thresher.errors import LaunchError

LOG_DIR = "THRESHER_LOG_DIR"
"""Set by ``thresher train`` for its ranks: the folder of their logs."""

LAUNCHER = "THRESHER_LAUNCHER"
"""Set by ``thresher train`` for its ranks: the process that started them."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set by torch elastic, and so by torchrun: where a dying rank leaves its report."""


@dataclass(frozen=True)
class Place:
    """This process among the others.

    Attributes:
        rank: 0 <= rank < world, over all machines.
        local_rank: the same on this machine, among ``local_world``.
        log_dir: folder of the ranks' logs; None under torchrun, which has its own.
        error_file: where to leave a report of a failure; None for nowhere.
        launcher: process id of the launcher that this rank must not outlive; 0 under torchrun.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    log_dir: Path | None = None
    error_file: Path | None = None
    launcher: int = 0


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that torchrun or torch elastic gave this process.

    Raises:
        LaunchError: a variable is absent, no number, or does not fit the others; names it.
    """
    rank, world, local_rank, local_world = (
        _number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    for name, value, size in (("RANK", rank, world), ("LOCAL_RANK", local_rank, local_world)):
        if not 0 <= value < size:
            raise LaunchError(
                f"{name} {value} is outside 0..{size - 1}", where="environment", fix="let torchrun set the variables"
            )
    log_dir, error_file = (environment.get(name) for name in (LOG_DIR, ERROR_FILE))
    return Place(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        log_dir=Path(log_dir) if log_dir else None,
        error_file=Path(error_file) if error_file else None,
        launcher=_number(environment, LAUNCHER) if LAUNCHER in environment else 0,
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise LaunchError(
            f"{name} is not set",
            where="environment",
            fix="start ranks with 'thresher train CONFIG' or "
            "'torchrun --nproc-per-node N -m thresher.launch.worker CONFIG'",
        )
    if not text.isdecimal():
        raise LaunchError(f"{name} is '{text}', not a number", where="environment", fix="let torchrun set it")
    return int(text)
