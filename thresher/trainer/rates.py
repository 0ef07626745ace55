"""Both learning rates of a run, moved along the schedule together."""

from collections.abc import Callable

from thresher.pipeline.parallel.dense import Stepping
from thresher.trainer.config import OptimConfig
from thresher.trainer.schedule import factor


class Rates:
    """Sets the learning rates of the dense part and of the tables before each step.

    Args:
        set_tables: sets the rate of the tables.

    Attributes:
        dense, tables: the rates in force.
    """

    def __init__(
        self, settings: OptimConfig, total_steps: int, dense: Stepping, set_tables: Callable[[float], None]
    ) -> None:
        self._settings, self._total_steps = settings, total_steps
        self._optimizer, self._set_tables = dense, set_tables
        self.dense, self.tables = settings.dense.lr, settings.tables.lr
        self._applied = 1.0

    def set(self, step: int) -> None:
        """Applies the schedule at ``step`` (0-based)."""
        scale = factor(self._settings.schedule, step, self._total_steps)
        if scale == self._applied:
            return
        self.dense, self.tables = self._settings.dense.lr * scale, self._settings.tables.lr * scale
        for group in self._optimizer.param_groups:
            group["lr"] = self.dense
        self._set_tables(self.tables)
        self._applied = scale
