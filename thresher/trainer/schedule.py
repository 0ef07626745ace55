"""Learning rate over time."""

import math

from thresher.trainer.config import Schedule


def factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """What the base learning rate is multiplied with at ``step`` (0-based), of ``total_steps``.

    ::

        1 |    /------\\               constant stays at 1, linear and cosine fall to ``floor``
          |   /         \\
        0 |  /            \\___ floor
            warm-up   decay
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    decay = schedule.decay_steps or max(total_steps - warmup, 1)
    progress = min((step - warmup) / decay, 1.0)
    if schedule.kind == "linear":
        return 1.0 - (1.0 - schedule.floor) * progress
    if schedule.kind == "cosine":
        return schedule.floor + (1.0 - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
