"""The ``pipeline`` section of a run."""

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field, model_validator

from thresher.pipeline.runtime.recompute import Recompute
from thresher.pipeline.schedule.ops import POLICIES
from thresher.settings import Settings

Positive = Annotated[int, Field(ge=1)]


class PipelineConfig(Settings):
    """How a model is cut into stages and its sequences into slices.

    With one of each, and no other way to pack, to hold or to offload, there is no pipeline.

    Attributes:
        stages: processes of a pipeline; the run's processes form as many pipelines as they suffice for.
        chunks: stages per process: layers are cut into ``stages x chunks`` runs of consecutive ones.
        slices: per sequence, at least ``stages`` (policy ``slimpipe``).
        microbatches: into which a step's samples of one pipeline are divided.
        slack: slices under way per hop: 2 hides transfers, 1 saves a little memory.
        policy: order of operations, see ``docs/pipeline.md``.
        exchange: whether ranks share the attention of late slices: ``off``, ``auto`` (as far as it pays), or the most
            slices that one operation hands over.
        split_embedding, split_head: cut the embedding and the output layer by rows over the stages.
        split_backward: at the end of a step, compute gradients of weights where there is nothing else to do.
        offload: share of the slices whose activations wait for their backward in host memory; devices only.
        recompute: what backward computes again instead of keeping it.
        dense: how pipelines share the work of the optimizer: all weights everywhere (``replicated``), layers
            ``sharded`` over the pipelines (FSDP2), or optimizer state sharded (``zero1``, DeepSpeed).
        slice_bounds: slices of as many tokens (``even``), or of as much work (``balanced``: shorter and shorter).
        packing: microbatches of ``padded`` sequences, or of the tokens that are there, one sequence after the other
            (``packed``).
        timeout_s: how long a message between stages may take.
    """

    stages: Positive = 1
    chunks: Positive = 1
    slices: Positive = 1
    microbatches: Positive = 1
    slack: int = Field(default=2, ge=1, le=2)
    policy: str = "slimpipe"
    exchange: Literal["off", "auto"] | Positive = "off"
    split_embedding: bool = False
    split_head: bool = False
    split_backward: bool = False
    offload: float = Field(default=0.0, ge=0, le=1)
    recompute: Recompute = "none"
    dense: Literal["replicated", "sharded", "zero1"] = "replicated"
    slice_bounds: Literal["even", "balanced"] = "even"
    packing: Literal["padded", "packed"] = "padded"
    timeout_s: float = Field(default=120.0, gt=0)

    @model_validator(mode="after")
    def _is_possible(self) -> "PipelineConfig":
        if self.policy not in POLICIES:
            raise ValueError(f"policy '{self.policy}' is not known; use one of {', '.join(POLICIES)}")
        if self.policy == "slimpipe" and self.slices < self.stages:
            raise ValueError(
                f"{self.slices} slices cannot keep {self.stages} stages busy; set slices to {self.stages} or more"
            )
        if self.exchange != "off" and self.policy != "slimpipe":
            raise ValueError(f"policy '{self.policy}' has no exchange; set exchange: off, or policy: slimpipe")
        if self.exchange != "off" and self.packing == "packed":
            raise ValueError(
                "an exchange is planned for sequences that fill their rows; set exchange: off, or packing: padded"
            )
        return self

    @property
    def is_on(self) -> bool:
        """Whether there is anything to cut."""
        is_changed = self.packing != "padded" or self.dense != "replicated" or self.offload > 0
        is_changed |= self.recompute != "none"
        return is_changed or self.stages * self.chunks * self.slices * self.microbatches > 1

    @property
    def timeout(self) -> timedelta:
        """How long a message may take."""
        return timedelta(seconds=self.timeout_s)

    def parts(self, world: int) -> int:
        """Into how many equal parts the samples of a step are divided on ``world`` processes."""
        return max(world // self.stages, 1) * self.microbatches
