"""Where a run stands: everything besides tensors that a resumed run needs."""

import math
from collections.abc import Collection

from pydantic import Field

from thresher.errors import ConfigError, nearest
from thresher.settings import Settings


class TrainState(Settings):
    """Immutable; each step yields the next one.

    Attributes:
        step: optimizer steps done.
        cursor: training samples consumed by all ranks since the beginning: the position in the data order.
        best_step, best_metrics: the best validation so far; step -1 for none.
        stale_evals: evaluations since then.
    """

    step: int = 0
    cursor: int = 0
    best_step: int = -1
    best_metrics: dict[str, float] = Field(default={})
    stale_evals: int = 0

    def stepped(self, samples: int) -> "TrainState":
        """After one more step over ``samples`` samples of all ranks."""
        return self.model_copy(update={"step": self.step + 1, "cursor": self.cursor + samples})

    def evaluated(self, metrics: dict[str, float], metric: str, min_delta: float) -> "TrainState":
        """After a validation: keeps ``metrics`` if ``metric`` improved by more than ``min_delta``; NaN never does.

        Args:
            metric: empty for the first one measured (AUC, MRR, MSE or loss, by kind of model).

        Raises:
            ConfigError: there is no such metric.
        """
        metric = metric or next(iter(metrics))
        require_measured(metric, metrics)
        value, best = metrics[metric], self.best_metrics.get(metric, math.nan)
        gain = best - value if lower_is_better(metric) else value - best
        if (math.isnan(best) and not math.isnan(value)) or gain > min_delta:
            return self.model_copy(update={"best_step": self.step, "best_metrics": metrics, "stale_evals": 0})
        return self.model_copy(update={"stale_evals": self.stale_evals + 1})


def require_measured(metric: str, measured: Collection[str], where: str = "eval.early_stop.metric") -> None:
    """Refuses a metric to decide by that is not measured.

    Args:
        where: the setting that names it.

    Raises:
        ConfigError: names the nearest one.
    """
    if metric not in measured:
        raise ConfigError(f"'{metric}' is not measured", where=where, fix=nearest(metric, measured))


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of ``metric`` is the better one (losses and errors)."""
    return metric.rpartition("/")[2] in ("logloss", "ne", "mse", "mae", "loss", "perplexity")
