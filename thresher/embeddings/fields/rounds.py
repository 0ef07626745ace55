"""The rounds of dropping as a machine of three states, without a model: what to do next, and what a checkpoint holds.

             drop                        check: metric held
SCORING  ------------>  TUNING  ------------------------------>  SCORING, or OVER after the last round
                                ------------------------------>  OVER
                                 check: lost more than allowed
"""

import math
from collections.abc import Mapping
from enum import IntEnum

import torch
from torch import Tensor

from thresher.embeddings.fields.config import FieldConfig


class Phase(IntEnum):
    """Where the rounds stand; the numbers are part of the checkpoint."""

    SCORING = 0
    TUNING = 1
    OVER = 2


class Rounds:
    """Counts rounds and steps; knows what is on trial.

    Attributes:
        done: rounds whose drops were kept.
        pending: fields dropped in the round in progress.
        reference: the metric before the first round; NaN until then.
    """

    def __init__(self, config: FieldConfig, fields: int) -> None:
        self.config, self._fields = config, fields
        self.phase = Phase.SCORING if config.drops else Phase.OVER
        self.done = 0
        self.pending: tuple[int, ...] = ()
        self.reference = math.nan
        self._check_at = 0

    def scores_due(self, step: int) -> bool:
        """Whether scores are read after ``step``."""
        since = step - self.config.start_after
        return since > 0 and since % self.config.score_every == 0

    def check_due(self, step: int, last: int) -> bool:
        """Whether the fields on trial are judged after ``step``; at the latest after the run's ``last``."""
        return self.phase is Phase.TUNING and (step >= self._check_at or step == last)

    def dropped(self, fields: tuple[int, ...], step: int) -> None:
        """A round begins."""
        self.phase, self.pending, self._check_at = Phase.TUNING, fields, step + self.config.check_after

    def held(self, value: float, lower_is_better: bool) -> bool:
        """Whether the metric lost no more than allowed; one that is no number did."""
        loss = value - self.reference if lower_is_better else self.reference - value
        return loss <= self.config.tolerance

    def judged(self, held: bool) -> None:
        """The round ends."""
        self.pending = ()
        self.done += held
        self.phase = Phase.SCORING if held and self.done < self.config.rounds else Phase.OVER

    def end(self) -> None:
        """There is nothing more to drop."""
        self.phase = Phase.OVER

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        pending = torch.zeros(self._fields, dtype=torch.bool)
        pending[list(self.pending)] = True
        numbers = [float(self.phase), float(self.done), float(self._check_at), self.reference]
        return {"rounds": torch.tensor(numbers, dtype=torch.float64), "pending": pending}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        phase, done, check_at, self.reference = state_dict["rounds"].tolist()
        self.phase, self.done, self._check_at = Phase(int(phase)), int(done), int(check_at)
        self.pending = tuple(torch.nonzero(state_dict["pending"]).flatten().tolist())
