"""Factorisation machines (Rendle 2010) over rows that hold a vector and its first-order weights side by side.

One lookup serves both orders:

    row of an id   [ v_1 .. v_d | w_1 .. w_L | unused ]      d factors, L labels, padded to a multiple of four floats
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Unpack(torch.autograd.Function):
    """Rows to vectors and the sums that an FM needs; the gradient is written into the rows' layout in one pass.

    Written as separate torch operations the backward takes twice the time, for it adds four gradients of rows' size.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factors: int, labels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        vectors = rows[..., :factors].contiguous()
        ctx.save_for_backward(vectors)
        ctx.shape = rows.shape
        first = rows[..., factors : factors + labels].sum(1)
        return vectors, first, vectors.sum(1), vectors.square().sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (vectors,) = ctx.saved_tensors
        of_vectors, of_first, of_sum, of_squares = gradients
        factors, labels = vectors.shape[2], of_first.shape[1]
        packed = vectors.new_empty(ctx.shape)
        quadratic = torch.addcmul(of_sum.unsqueeze(1), vectors, of_squares.unsqueeze(1), value=2)
        torch.add(quadratic, of_vectors, out=packed[..., :factors])
        packed[..., factors : factors + labels] = of_first.unsqueeze(1)
        packed[..., factors + labels :] = 0
        return packed, None, None


def unpack(rows: Tensor, factors: int, labels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Splits packed rows and sums them.

    Args:
        rows: [B, F, width], width >= factors + labels.

    Returns:
        vectors [B, F, factors], contiguous; the sum over fields of first-order weights [B, labels]; of vectors
        [B, factors]; of squared vectors [B, factors].
    """
    unpacked: tuple[Tensor, Tensor, Tensor, Tensor] = _Unpack.apply(rows, factors, labels)  # type: ignore[no-untyped-call]
    return unpacked


def pair_sum(total: Tensor, squares: Tensor) -> Tensor:
    """[B, d]: sum over i < j of v_i * v_j, as ((sum v)^2 - sum v^2) / 2 (Rendle 2010, lemma 3.1)."""
    return (total.square() - squares) * 0.5


class FactorizationMachine(nn.Module):
    """b + sum_i w_i x_i + sum_{i<j} <v_i, v_j> x_i x_j, one output a label.

    Ids have x = 1 and bring (v, w) in their row; a float feature has its own v and w here. With several labels each
    has its own first order; the second order is shared, its d products weighed per label (weights start at one).
    """

    def __init__(self, factors: int, floats: int, labels: int) -> None:
        super().__init__()
        self.factors, self.labels = factors, labels
        self.bias = nn.Parameter(torch.zeros(labels))
        self.float_weights = nn.Parameter(torch.zeros(floats, labels)) if floats else None
        self.float_vectors = nn.Parameter(torch.randn(floats, factors) * 0.01) if floats else None
        self.pair_weights = nn.Parameter(torch.ones(factors, labels)) if labels > 1 else None

    def forward(self, rows: Tensor, floats: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, labels] and the ids' vectors [B, F, d], from packed rows [B, F, width] and floats [B, n]."""
        vectors, first, total, squares = unpack(rows, self.factors, self.labels)
        if self.float_weights is not None and self.float_vectors is not None:
            first = first + floats @ self.float_weights
            total = total + floats @ self.float_vectors
            squares = squares + floats.square() @ self.float_vectors.square()
        pairs = pair_sum(total, squares)
        second = pairs.sum(1, keepdim=True) if self.pair_weights is None else pairs @ self.pair_weights
        return self.bias + first + second, vectors

    def linear(self, layer: nn.Linear, vectors: Tensor, floats: Tensor) -> Tensor:
        """``layer`` applied to all fields' x_i v_i, ids first: [B, units] from the ids' vectors [B, F, d].

        W_i (x_i v_i) = x_i (W_i v_i), so a float field costs one column of the product instead of d.
        """
        values, weight = vectors.flatten(1), layer.weight
        if self.float_vectors is not None:
            ids, rest = weight[:, : values.shape[1]], weight[:, values.shape[1] :]
            columns = torch.einsum("und,nd->un", rest.reshape(len(rest), *self.float_vectors.shape), self.float_vectors)
            values, weight = torch.cat([values, floats], dim=1), torch.cat([ids, columns.to(ids.dtype)], dim=1)
        return nn.functional.linear(values, weight, layer.bias)
