"""Starts the ranks of a run on this machine with torch elastic, and ends all of them when one ends badly."""

import logging
import os
import platform
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from thresher.errors import LaunchError
from thresher.launch.failure import Failure, Interrupted, RankFailed, first, of_process
from thresher.launch.place import ERROR_FILE, LAUNCHER, LOG_DIR

GRACE_S = 5
"""How long ranks may take to end when the launcher is told to."""


def run_ranks(arguments: Sequence[str], count: int, log_dir: Path, threads: int) -> None:
    """Runs ``python ARGUMENTS`` as ``count`` ranks and waits for them.

    Args:
        arguments: of the interpreter, such as ``-m thresher.launch.worker CONFIG``.
        log_dir: made if need be; gets ``rank-N.log`` of each rank.
        threads: compute threads of each rank.

    Raises:
        RankFailed: a rank failed or was killed; the others have been ended.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; all ranks have been ended.
        LaunchError: ``log_dir`` cannot be made.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"no folder can be made: {error.strerror}", where=str(log_dir), fix="set run_dir to a writable place"
        ) from None
    _silence_elastic()
    with tempfile.TemporaryDirectory(prefix="thresher-") as reports:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=GRACE_S,
            logs_specs=_RankLogs(log_dir, Path(reports), _environment(threads)),
        )
        try:
            # Elastic substitutes $-macros in arguments; overrides may hold a dollar sign.
            elastic_launch(config, sys.executable)(*(argument.replace("$", "$$") for argument in arguments))
        except ChildFailedError as error:
            failures = [_failure(rank, failure) for rank, failure in error.failures.items()]
            raise RankFailed(first(failures), log_dir) from None
        except SignalException as error:
            raise Interrupted(error.sigval) from None


def _failure(rank: int, failure: ProcessFailure) -> Failure:
    return of_process(rank, failure.exitcode, float(failure.timestamp), failure.error_file_data)


class _RankLogs(LogsSpecs):
    """Leaves the streams of all ranks alone (each directs its own), and tells each where its log and report go."""

    def __init__(self, log_dir: Path, reports: Path, environment: dict[str, str]) -> None:
        super().__init__()
        self.log_dir, self.reports, self.environment = log_dir, reports, environment

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Adds to the environment of each local rank, in place."""
        for rank, environment in envs.items():
            environment |= self.environment
            environment[LOG_DIR] = str(self.log_dir)
            environment[LAUNCHER] = str(os.getpid())
            environment[ERROR_FILE] = str(self.reports / f"rank-{rank}.json")
        terminal = dict.fromkeys(envs, "")
        return LogsDest(terminal, terminal, error_files={rank: env[ERROR_FILE] for rank, env in envs.items()})

    @property
    def root_log_dir(self) -> str:
        """The folder of the ranks' logs."""
        return str(self.log_dir)


def _environment(threads: int) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(threads)}
    # The C++ part of torch warns on standard error, between the lines of a progress bar.
    environment["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    if platform.system() == "Linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # All ranks are here; the name of a machine need not resolve.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def _silence_elastic() -> None:
    """Elastic reports dying ranks in its own words; ours come once, and first."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
