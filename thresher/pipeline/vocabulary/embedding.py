"""The input embedding, cut by rows of the vocabulary.

    ids         3  0  3  5  1          parts: rows 0..2 on rank 0, 3..5 on rank 1
    rank 0         e0       e1         rows(ids): those it owns, in the order of their places
    rank 1      e3    e3 e5
    rank 0      e3 e0 e3 e5 e1         assemble(ids, [rank 0's, rank 1's])

An embedding that is not cut is the same with one part. Nothing here runs under autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from thresher.pipeline.vocabulary.arithmetic import add_rows, by_hand, gradient_of
from thresher.pipeline.vocabulary.rows import row_range


class SplitEmbedding(nn.Module):
    """Rows first .. last - 1 of an embedding of ``vocabulary`` rows.

    Ids must be rows: :func:`thresher.pipeline.vocabulary.rows.require_rows` says so before the step.

    Args:
        weight: [last - first, D], rows :func:`row_range` (vocabulary, parts, part). May be the output layer's too:
            gradients add.
        vocabulary: rows of all parts.
        parts: number of parts.
        part: which one this is.

    Raises:
        ConfigError: more parts than rows.
        ValueError: ``weight`` has another number of rows.
    """

    def __init__(self, weight: nn.Parameter, vocabulary: int, parts: int = 1, part: int = 0) -> None:
        super().__init__()
        first, last = row_range(vocabulary, parts, part)
        if weight.shape[0] != last - first:
            raise ValueError(f"{weight.shape[0]} rows given for rows {first}..{last - 1} of part {part}")
        self.weight = weight
        self.vocabulary, self.parts, self.part = vocabulary, parts, part
        self._ranges = [row_range(vocabulary, parts, number) for number in range(parts)]

    def counts(self, ids: Tensor) -> Tensor:
        """[parts] int64: how many of ``ids`` are rows of each part."""
        return torch.stack([self._owned(ids, part).sum() for part in range(self.parts)])

    def rows(self, ids: Tensor) -> Tensor:
        """[count, D]: rows of the ``ids`` [B, T] int64 that this part owns, in the order of their places."""
        with by_hand(self.weight.device):
            return self.weight.index_select(0, self._local(ids))

    def assemble(self, ids: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """[B, T, D] from what :meth:`rows` of all parts gave, in order of parts."""
        if self.parts == 1:
            return parts[0].view(*ids.shape, -1)
        whole = parts[0].new_empty(*ids.shape, parts[0].shape[-1])
        for part, rows in enumerate(parts):
            whole[self._owned(ids, part)] = rows
        return whole

    def gradient_parts(self, ids: Tensor, gradient: Tensor) -> list[Tensor]:
        """By part, [count, D]: its share of ``gradient`` [B, T, D], in the order of places."""
        if self.parts == 1:
            return [gradient.flatten(0, -2)]
        return [gradient[self._owned(ids, part)] for part in range(self.parts)]

    def add_gradient(self, ids: Tensor, gradient: Tensor) -> None:
        """Adds this part's share ``gradient`` [count, D] to ``weight.grad``, in a fixed order."""
        with by_hand(self.weight.device):
            add_rows(gradient_of(self.weight), self._local(ids), gradient)

    def _owned(self, ids: Tensor, part: int) -> Tensor:
        first, last = self._ranges[part]
        return (ids >= first) & (ids < last)

    def _local(self, ids: Tensor) -> Tensor:
        first, _ = self._ranges[self.part]
        return ids.flatten() if self.parts == 1 else torch.masked_select(ids, self._owned(ids, self.part)) - first
