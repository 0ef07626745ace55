"""How a runtime carries out a schedule; nothing here changes what is computed, up to rounding."""

from dataclasses import dataclass
from datetime import timedelta

import torch

from thresher.pipeline.runtime.recompute import Recompute


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of a :class:`PipelineRuntime`.

    Attributes:
        timeout: how long a message may take before the step is given up.
        recompute: what backward computes again instead of keeping it.
        offload: share of the slices whose saved tensors wait for backward in host memory, 0 .. 1; CUDA only.
        autocast: dtype of matrix products; None for that of the parameters.
        seed: of dropout and sampled negatives; differs between replicas.
    """

    timeout: timedelta = timedelta(seconds=120)
    recompute: Recompute = "none"
    offload: float = 0.0
    autocast: torch.dtype | None = None
    seed: int = 0
