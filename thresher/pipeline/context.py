"""What a layer of a trunk is given besides its input: everything that knows of slices, and nothing of ranks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.pipeline.vocabulary.head import Head


@dataclass(frozen=True)
class RelativeBias:
    """Learned additive bias of pointwise attention by distance (HSTU, arXiv:2402.17152).

    bias[h, i, j] = by_position[h, min(position_i - position_j, P - 1)]
                  + by_time[h, min(floor(log2(1 + |t_i - t_j|)), Q - 1)]

    Attributes:
        by_position: [H, P] parameter.
        by_time: [H, Q] parameter, or None; needs times of the microbatch.
    """

    by_position: Tensor
    by_time: Tensor | None = None


class SliceContext(ABC):
    """One slice (or a whole microbatch) as the layers of a trunk see it.

    Layers are functions ``layer(x, context)`` of [B, T, D] to [B, T, D]. Each has an ``index``, unique in the trunk.
    """

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """[T] int64: place of each token in its own sequence, from 0."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal softmax attention over the slice and all earlier tokens of its sequences.

        Args:
            layer: index of the layer in the trunk; a layer attends once.
            query: [B, H, T, E], rotated already where positions are rotary.
            key, value: [B, G, T, E] of this slice alone; G divides H (grouped queries).

        Returns:
            [B, H, T, E].
        """

    @abstractmethod
    def attend_pointwise(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None
    ) -> Tensor:
        """HSTU's attention: out_i = sum over j <= i of silu(q_i . k_j / sqrt(E) + bias_ij) v_j / S.

        S is the divisor of the layout. Shapes as in :meth:`attend`, with G = H.
        """

    @abstractmethod
    def drop(self, values: Tensor, share: float, layer: int, site: int = 0) -> Tensor:
        """Dropout whose mask is a function of (seed, step, microbatch, slice, layer, site) alone. Identity in eval."""


class TrunkLayer(nn.Module, ABC):
    """One layer of a trunk.

    Attributes:
        index: its number in the trunk, from 0; front and tail modules of a trunk have -1.
    """

    index: int

    @abstractmethod
    def forward(self, values: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] from [B, T, D]."""


class TrunkBuilder(ABC):
    """Makes the parts of a model, each from its own seed, so that any rank can make just what it holds.

    Parameters have the same names in every cut: ``front.*``, ``layers.{index}.*``, ``tail.*``, ``embedding.weight``,
    ``head.weight``.

    Attributes:
        layers: number of layers, L.
        width: of hidden states, D.
        vocabulary: rows of the embedding and of the output layer, V. Inputs that are vectors pass the
            embedding by.
        tied: the output layer is the embedding.
    """

    layers: int
    width: int
    vocabulary: int
    tied: bool

    @abstractmethod
    def front(self) -> TrunkLayer | None:
        """What the first stage does before its layers (positions, dropout); None for nothing."""

    @abstractmethod
    def layer(self, index: int) -> TrunkLayer:
        """Layer ``index``."""

    @abstractmethod
    def tail(self) -> TrunkLayer | None:
        """What the last stage does after its layers (final norm); None for nothing."""

    @abstractmethod
    def table(self, name: str, first: int, last: int, device: torch.device) -> Tensor:
        """[last - first, D]: rows first .. last - 1 of ``embedding`` or ``head`` as they are initialised."""

    @abstractmethod
    def head(self, weight: nn.Parameter, first: int) -> Head:
        """The loss over rows ``first`` .. of the output layer, which ``weight`` [rows, D] holds."""
