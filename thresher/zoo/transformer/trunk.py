"""The parts of a transformer, each made from its own seed."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from thresher.embeddings.init import fill
from thresher.pipeline.context import TrunkBuilder, TrunkLayer
from thresher.pipeline.vocabulary.binary import BinaryHead
from thresher.pipeline.vocabulary.head import Head
from thresher.pipeline.vocabulary.negatives import LogUniform, Sampler, Uniform
from thresher.pipeline.vocabulary.sampled import SampledSoftmaxHead
from thresher.pipeline.vocabulary.softmax import SoftmaxHead
from thresher.zoo.transformer.layers import Front, PointwiseLayer, SoftmaxLayer, Tail
from thresher.zoo.transformer.shape import TrunkShape

INIT_STD = 0.02
"""Of matrices and embeddings (Radford et al. 2019, "GPT-2"); what layers add begins smaller by sqrt(2 L)."""

Loss = Literal["softmax", "sampled_softmax", "bce"]
Sampling = Literal["uniform", "log_uniform"]


@dataclass(frozen=True)
class Output:
    """The output layer.

    Attributes:
        items: rows that negatives are drawn from.
        sampling: how.
        negatives: per slice (``sampled_softmax``) or per token (``bce``).
    """

    loss: Loss
    items: range
    sampling: Sampling
    negatives: int

    @property
    def sampler(self) -> Sampler:
        """The distribution of negatives."""
        kind = LogUniform if self.sampling == "log_uniform" else Uniform
        return kind(self.items.start, self.items.stop)


class TransformerTrunk(TrunkBuilder):
    """Makes parts; initial values are a pure function of (seed, name, row, column).

    Args:
        vocabulary: rows of embedding and output layer.
        length: tokens of the longest sequence.
        seed: of initial values.
    """

    def __init__(
        self, shape: TrunkShape, vocabulary: int, length: int, output: Output, *, tied: bool, seed: int
    ) -> None:
        self.shape, self.length, self.output, self.seed = shape, length, output, seed
        self.layers, self.width, self.vocabulary, self.tied = shape.layers, shape.dim, vocabulary, tied

    def front(self) -> TrunkLayer | None:
        """Learned positions and dropout; None without either."""
        if self.shape.positions != "learned" and not self.shape.dropout:
            return None
        return self._made(Front(self.shape, self.length), "front")

    def layer(self, index: int) -> TrunkLayer:
        """Layer ``index``."""
        made = PointwiseLayer(self.shape, index) if self.shape.pointwise else SoftmaxLayer(self.shape, index)
        return self._made(made, f"layers.{index}")

    def tail(self) -> TrunkLayer:
        """The last norm."""
        return self._made(Tail(self.shape), "tail")

    def table(self, name: str, first: int, last: int, device: torch.device) -> Tensor:
        """[last - first, D]; see :class:`TrunkBuilder`."""
        rows = torch.empty(last - first, self.width)
        _fill(rows, self.seed, name, INIT_STD, first)
        return rows.to(device)

    def head(self, weight: nn.Parameter, first: int) -> Head:
        """The loss over the rows ``weight`` [rows, D]."""
        output = self.output
        if output.loss == "sampled_softmax":
            return SampledSoftmaxHead(weight, first, sampler=output.sampler, count=output.negatives)
        if output.loss == "bce":
            return BinaryHead(weight, first, sampler=output.sampler, count=output.negatives)
        return SoftmaxHead(weight, first, self.vocabulary)

    def _made(self, part: TrunkLayer, name: str) -> TrunkLayer:
        """``part`` with its matrices filled; vectors (norms, biases) and biases by distance keep their 1 and 0."""
        for path, parameter in part.named_parameters():
            if path.endswith("weight") and parameter.dim() == 2:
                adds = path.rpartition(".")[0].rpartition(".")[2] == "out"
                std = INIT_STD / (2 * self.layers) ** 0.5 if adds else INIT_STD
                _fill(parameter, self.seed, f"{name}.{path}", std)
            elif path.endswith("bias"):
                nn.init.zeros_(parameter)
        return part


def _fill(weight: Tensor, seed: int, name: str, std: float, first: int = 0) -> None:
    """Uniform values of standard deviation ``std`` into ``weight`` [rows, cols], rows ``first`` .. of ``name``."""
    fill(weight, seed, name, weight.shape[1], std * 3**0.5, first)
