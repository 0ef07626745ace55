"""How attention of one operation is shared between two ranks (context exchange, arXiv 2504.14519).

The giver sends its oldest keys and values with its queries; the helper, which is at the same layer of its own
operation, attends to them and sends the result back. Backward likewise, with the *merged* output and logsumexp. The
helper keeps nothing.

    forward   giver:  send K, V, q | own attention on the rest | receive out', lse' | merge
              helper: receive      | own attention             | attend (no mask)   | send out', lse'
    backward  giver:  send K, V, q, out, lse, dout | own part  | receive dq', dK', dV' | add
              helper: receive                      | own part  | backward (no mask)    | send dq', dK', dV'
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.pipeline.microbatch import Microbatch


class Arriving(ABC):
    """Tensors under way."""

    @abstractmethod
    def wait(self) -> list[Tensor]:
        """The tensors, once they are here.

        Raises:
            PipelineStalled: they did not come in time.
        """


class Port(ABC):
    """The line to the peer of one shared operation.

    Attributes:
        share: slices moved; positive for the giver, negative for the helper.
        partner: the microbatch of the peer's operation.
        partner_slice: its slice.
    """

    share: int
    partner: Microbatch
    partner_slice: int

    @abstractmethod
    def send(self, tensors: Sequence[Tensor]) -> None:
        """Starts to send contiguous tensors; they are kept until they are gone."""

    @abstractmethod
    def receive(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> Arriving:
        """Starts to receive tensors of the given shapes and dtypes, in the order they are sent."""
