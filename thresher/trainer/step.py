"""One optimizer step: forward, loss, backward (which updates the tables), clip, dense update."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.data.batch import Batch
from thresher.embeddings.policy.importance import sample_importance
from thresher.errors import ThresherError
from thresher.sharding.logical import is_finite
from thresher.sharding.model import ShardedModel
from thresher.trainer.config import TrainConfig
from thresher.trainer.model import Model

CURE = "lower optim.dense.lr or optim.tables.lr, warm up (optim.schedule.warmup_steps) or set train.clip_norm"


class TrainingDiverged(ThresherError):
    """The loss or a weight is no finite number; what the newest checkpoint holds is."""


@dataclass(frozen=True)
class StepResult:
    """What a step yields.

    Attributes:
        loss: scalar, mean over the rank's micro-batches, detached.
        outputs: outputs of the last micro-batch, detached.
        grad_norm: norm of the dense gradient before clipping; NaN where clipping is off.
    """

    loss: Tensor
    outputs: dict[str, Tensor]
    grad_norm: float


class Stepper:
    """Takes steps on one model.

    Args:
        sharded: the model as the ranks run it together; called for the forward.
        model: the same model without wrappers; gives the loss.
        optimizer: of the dense part.
        positive_weight: how much rows of positive samples count in priorities; those of others count 1.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        model: Model,
        optimizer: torch.optim.Optimizer,
        settings: TrainConfig,
        device: torch.device,
        positive_weight: float = 1.0,
    ) -> None:
        self._sharded, self._model, self._optimizer, self._settings = sharded, model, optimizer, settings
        self._device, self._positive_weight = device, positive_weight
        self._dense = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Forward and backward of every micro-batch, then the dense update.

        Raises:
            TrainingDiverged: the loss of a micro-batch is NaN or infinite.
        """
        self._optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        outputs: dict[str, Tensor] = {}
        for batch in batches:
            self._sharded.observe(sample_importance(batch.labels, self._positive_weight, batch.weight))
            with autocast(self._settings, self._device):
                outputs = self._sharded.wrapped(batch)
                loss = self._model.loss(outputs, batch)
            require_finite_loss(loss, step)
            (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            self._sharded.step_tables()
            losses.append(loss.detach())
        norm = self._clip()
        self._optimizer.step()
        detached = {name: output.detach() for name, output in outputs.items()}
        return StepResult(torch.stack(losses).mean(), detached, norm)

    def _clip(self) -> float:
        if not self._settings.clip_norm or not self._dense:
            return math.nan
        return float(nn.utils.clip_grad_norm_(self._dense, self._settings.clip_norm))


def autocast(settings: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """The precision of the dense part as a context."""
    if settings.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def require_finite_weights(model: nn.Module, step: int) -> None:
    """Refuses to go on with weights that are no numbers: a checkpoint of them could never be trained on.

    Only this rank's part is looked at. A row that few samples touch may be broken long before a loss shows it.

    Raises:
        TrainingDiverged: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise TrainingDiverged(f"'{name}' holds values that are not finite", where=f"step {step}", fix=CURE)


def require_finite_loss(loss: Tensor, step: int) -> None:
    """Refuses to take a step that a loss of no finite value asks for.

    Raises:
        TrainingDiverged: says what to change.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingDiverged(f"the loss is {value}", where=f"step {step}", fix=CURE)
