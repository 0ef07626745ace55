"""What the steps since the last record amounted to."""

import math
import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.data.batch import Batch
from thresher.trainer.callbacks.base import StepRecord
from thresher.trainer.metrics import BinaryMetrics
from thresher.trainer.rates import Rates
from thresher.trainer.state import TrainState
from thresher.trainer.step import StepResult
from thresher.trainer.world import World

WINDOW_SAMPLES = 1 << 16
"""How many of the newest training samples of rank 0 the running AUC looks at."""


class Meter:
    """Collects per step without waiting for the device; :meth:`record` sums up over the ranks.

    Args:
        epoch_rows: training rows of one epoch.
        output: name of the output that the running AUC is about; empty for no AUC.
        label: its column of ``Batch.labels``.
    """

    def __init__(self, world: World, epoch_rows: int, rates: Rates, output: str = "", label: int = 0) -> None:
        self._world, self._epoch_rows, self._rates = world, epoch_rows, rates
        self._output, self._label = output, label
        self._window: deque[tuple[Tensor, Tensor, Tensor]] = deque()
        self._losses: list[Tensor] = []
        self._busy = self._waited = 0.0
        self._samples = 0
        self._mark = time.perf_counter()

    def resume(self) -> None:
        """Restarts the clock: what happened since the last step (an evaluation, a save) is no training time."""
        self._mark = time.perf_counter()

    def add(self, result: StepResult, batch: Batch, samples: int, waited: float) -> None:
        """One step: ``batch`` is its last micro-batch, ``samples`` those of all ranks, ``waited`` seconds for data."""
        now = time.perf_counter()
        self._busy += now - self._mark
        self._mark = now
        self._waited += waited
        self._samples += samples
        self._losses.append(result.loss)
        if self._output and self._world.rank == 0:
            self._window.append((result.outputs[self._output], batch.labels[:, self._label], batch.weight))
            while sum(scores.numel() for scores, _, _ in self._window) > WINDOW_SAMPLES and len(self._window) > 1:
                self._window.popleft()

    def record(self, state: TrainState, result: StepResult) -> StepRecord:
        """Collective. The steps since the last record, which are forgotten."""
        loss, busy, waited = self._reduce()
        record = StepRecord(
            step=state.step,
            epoch=state.cursor / self._epoch_rows,
            samples=state.cursor,
            loss=loss,
            auc=self._auc(),
            samples_per_s=self._samples / busy,
            data_wait=waited / busy,
            lr_dense=self._rates.dense,
            lr_tables=self._rates.tables,
            grad_norm=result.grad_norm,
            seconds=busy,
        )
        self._losses.clear()
        self._busy = self._waited = 0.0
        self._samples = 0
        return record

    def _reduce(self) -> tuple[float, float, float]:
        """Mean loss over ranks; the longest time and the longest wait of any rank."""
        loss = torch.stack(self._losses).double().mean().reshape(1)
        times = torch.tensor([self._busy, self._waited], dtype=torch.float64, device=loss.device)
        if self._world.world > 1:
            dist.all_reduce(loss)
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return float(loss) / self._world.world, float(times[0]), float(times[1])

    def _auc(self) -> float:
        if not self._window:
            return math.nan
        metrics = BinaryMetrics()
        for logits, labels, weight in self._window:
            metrics.update(logits.float(), labels, weight)
        return metrics.local_auc()
