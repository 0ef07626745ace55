"""A table whose rows are all fp32: what it costs nothing to keep. Every tensor is plain, so TorchRec can show it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.embeddings.rows.region import Region, forget


class FlatTable:
    """A rectangle of a table in fp32, with its optimizer state.

    Args:
        name: of the table, for messages.
        rows, dim: of this rectangle.
        scalar: whether the optimizer keeps one number a row.
        vectors: numbers the optimizer keeps for each weight.
        full_dim: columns of the whole table; 0 for ``dim``.
        weights: [rows, dim] fp32 contiguous, taken over; None to allocate (zeros, 2 MB pages).

    Attributes:
        weights: [rows, dim] fp32.
        scalar: [rows] fp32, or empty.
        vectors: [rows, dim] fp32 each.
        step: updates done; of the counter-based generator and of Adam's bias correction.
        released: whether the rows were given up.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        dim: int,
        *,
        scalar: bool,
        vectors: int,
        full_dim: int = 0,
        weights: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.rows, self.dim, self.full_dim = name, rows, dim, full_dim or dim
        self.device = torch.device(device)
        self.weights = self._zeros(rows, dim) if weights is None else weights
        self.scalar = self._zeros(rows if scalar else 0, 1).view(-1)
        self.vectors: Sequence[Tensor] = [self._zeros(rows, dim) for _ in range(vectors)]
        self.step = 0
        self.released = False

    def release(self) -> None:
        """Gives up all rows and their memory: for a table that nothing reads any more. They read as zeros."""
        for values in (self.weights, self.scalar, *self.vectors):
            forget(values)
        self.released = True

    def _zeros(self, rows: int, dim: int) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(rows, dim, device=self.device)
        size = rows * dim * 4
        return Region(size).bytes[:size].view(torch.float32).view(rows, dim)

    def advance(self) -> None:
        """Begins the next update."""
        self.step += 1

    @property
    def nbytes(self) -> int:
        """Bytes of weights and state; 0 after :meth:`release`."""
        if self.released:
            return 0
        return self.weights.nbytes + self.scalar.nbytes + sum(vector.nbytes for vector in self.vectors)
