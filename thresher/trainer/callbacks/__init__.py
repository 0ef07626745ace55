"""What happens beside a step: progress, records on disk, the report."""

from pathlib import Path
from typing import Any

from rich.console import Console

from thresher.trainer.callbacks.base import Callback
from thresher.trainer.callbacks.progress import Progress
from thresher.trainer.callbacks.records import Records
from thresher.trainer.callbacks.report import Report
from thresher.trainer.callbacks.sinks import Forward
from thresher.trainer.callbacks.tensorboard import TensorBoard
from thresher.trainer.config import RunConfig
from thresher.trainer.world import World


def standard_callbacks(config: RunConfig[Any], folder: Path, world: World) -> tuple[Callback, ...]:
    """Progress, records, TensorBoard and the report on rank 0; nothing on the others, which stay silent."""
    if not world.is_first:
        return ()
    board = (Forward(TensorBoard(folder / "tensorboard")),) if config.tensorboard else ()
    return (Progress(Console()), Records(folder), *board, Report(folder))
