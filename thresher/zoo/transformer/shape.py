"""What every layer of a transformer is told."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrunkShape:
    """Sizes and kinds of layers; see ``TransformerConfig``.

    Attributes:
        pointwise: HSTU's layers.
        timed: pointwise attention has a bias by time.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    pointwise: bool
    positions: Literal["rotary", "learned", "none"]
    distances: int
    timed: bool
    norm: Literal["layer", "rms"]
    activation: Literal["gelu", "swiglu"]
    dropout: float

    @property
    def head_dim(self) -> int:
        """Width of one head, E."""
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        """Width of all heads of keys, G x E."""
        return self.kv_heads * self.head_dim
