"""What every rank of a pipeline is given of a microbatch, and one slice of it."""

from dataclasses import dataclass

from torch import Tensor

from thresher.pipeline.layout import Layout


@dataclass(frozen=True)
class Microbatch:
    """One microbatch; the same on every rank of a pipeline, but for ``inputs`` that are vectors.

    Attributes:
        layout: how its tokens are cut.
        inputs: [B, S] int64 rows of the embedding; or [B, S, D] vectors, which rank 0 alone needs (other ranks may hand
            in anything of that shape, also an expanded scalar).
        targets: [B, S] int64 rows of the output layer.
        weights: [B, S] float: how much each token counts in the loss; 0 for padding.
        times: [B, S] int64 seconds, for attention biases by time; None where no layer wants them.
    """

    layout: Layout
    inputs: Tensor
    targets: Tensor
    weights: Tensor
    times: Tensor | None = None

    @property
    def are_vectors(self) -> bool:
        """Whether inputs are vectors already."""
        return self.inputs.dim() == 3

    def cut(self, values: Tensor, index: int) -> Tensor:
        """Slice ``index`` of ``values`` [B, S, ...]: [B, T, ...], a view."""
        bounds = self.layout.bounds
        return values[:, bounds[index] : bounds[index + 1]]
