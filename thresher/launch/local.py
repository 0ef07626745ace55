"""Commands that run on this machine: start the ranks, and nothing else."""

from pathlib import Path
from typing import Any

from thresher.errors import ConfigError
from thresher.launch.group import check_batches, check_device
from thresher.launch.preparing import dataset_for
from thresher.launch.processes import run_ranks
from thresher.trainer.config import LaunchConfig, RunConfig, load_config
from thresher.trainer.folder import RunFolder
from thresher.zoo.registry import RunConfig as AnyRunConfig


def train_here(file: Path, overrides: tuple[str, ...]) -> None:
    """Checks the configuration, prepares its data if need be, and trains on ``launch.processes`` ranks.

    Raises:
        ThresherError: configuration or data are not usable.
        RankFailed: a rank failed; the others have been ended.
        Interrupted: a signal came; all ranks have been ended.
    """
    config: RunConfig[Any] = load_config(AnyRunConfig, file, overrides)
    check_batches(config.train, config.launch.processes, config.pipeline)
    check_device(config.launch, config.launch.processes)
    dataset_for(config.data.path, config.data.recipe, config.data.options, str(file))
    _run("worker", [str(file), *overrides], config.launch, RunFolder(config.folder))


def evaluate_here(root: Path, split: str, checkpoint: int, processes: int) -> None:
    """Measures a run's checkpoint on ``split``; see :func:`thresher.launch.eval_worker.evaluate`.

    Args:
        processes: ranks; 0 for as many as the run had.

    Raises:
        ConfigError: ``root`` is no run directory.
        ThresherError: data or checkpoint are not usable.
        RankFailed: a rank failed; the others have been ended.
        Interrupted: a signal came; all ranks have been ended.
    """
    config = run_config(root)
    launch = config.launch.model_copy(update={"processes": processes or config.launch.processes})
    check_device(launch, launch.processes)
    _run("eval_worker", [str(root), split, str(checkpoint)], launch, RunFolder(root))


def run_config(root: Path) -> RunConfig[Any]:
    """The configuration that a run has left in its folder.

    Raises:
        ConfigError: ``root`` is no run directory, or its configuration is not usable.
    """
    folder = RunFolder(root)
    if not folder.config.is_file():
        raise ConfigError(
            "is no run directory: it holds no config.yaml", where=str(root), fix="give a folder that training has made"
        )
    config: RunConfig[Any] = load_config(AnyRunConfig, folder.config)
    return config


def report_here(root: Path) -> None:
    """Writes ``report.html`` of a run again and says where.

    Raises:
        ConfigError: ``root`` is no run directory.
        DataError: the run has left no records.
    """
    from thresher.trainer.report import build_report

    run_config(root)
    print(build_report(root))


def _run(module: str, arguments: list[str], launch: LaunchConfig, folder: RunFolder) -> None:
    run_ranks(["-m", f"thresher.launch.{module}", *arguments], launch.processes, folder.logs, launch.threads)
