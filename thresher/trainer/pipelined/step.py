"""One optimizer step of a pipeline: its schedule, the sum over replicas, clipping, the update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thresher.data.batch import Batch
from thresher.pipeline.parallel.clip import clip_gradients
from thresher.pipeline.parallel.dense import DenseState, Stepping
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.trainer.model import Sequencer
from thresher.trainer.pipelined.cut import Cutter
from thresher.trainer.step import StepResult, require_finite_loss


@dataclass(frozen=True)
class PipelinedStepper:
    """Takes steps on one model.

    Attributes:
        samples: of a step, over all replicas.
        clip_norm: upper bound on the norm of the gradient; 0 for none.
    """

    runtime: PipelineRuntime
    state: DenseState
    optimizer: Stepping
    sequencer: Sequencer
    cutter: Cutter
    samples: int
    clip_norm: float

    def step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """One batch, this replica's. Collective.

        Raises:
            TrainingDiverged: the loss of this replica is NaN or infinite.
            PipelineStalled: another rank is gone or too slow.
        """
        (batch,) = batches
        self.optimizer.zero_grad()
        microbatches, _ = self.cutter.cut(self.sequencer.sequences(batch), self.sequencer.last(batch) + 1)
        outcome = self.runtime.step(
            microbatches, total_weight=float(self.samples), step=step, chunk_done=self.state.chunk_done
        )
        # Of the mean over samples of all replicas, outcome.loss is what this one adds.
        loss = outcome.loss.detach() * self.state.mesh.replicas
        require_finite_loss(loss, step)
        self.state.finish()
        norm = clip_gradients(self.state.gradients(), self.state.mesh, self.clip_norm) if self.clip_norm else math.nan
        self.optimizer.step()
        return StepResult(loss, {}, norm)
