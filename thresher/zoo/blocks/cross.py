"""Cross layers of DCN V2 (Wang et al. 2020, arXiv:2008.13535)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CrossLayer(nn.Module):
    """Equation 1: x' = x0 * (W x + b) + x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, first: Tensor, values: Tensor) -> Tensor:
        """[B, D] from the network's input x0 [B, D] and the layer's input x [B, D]."""
        crossed: Tensor = values + first * self.linear(values)
        return crossed


class LowRankCrossLayer(nn.Module):
    """Equation 2: x' = x0 * (U (V^T x) + b) + x, with U, V of D x rank."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)

    def forward(self, first: Tensor, values: Tensor) -> Tensor:
        """[B, D] from x0 [B, D] and x [B, D]."""
        crossed: Tensor = values + first * self.up(self.down(values))
        return crossed


class MixtureCrossLayer(nn.Module):
    """Equations 3 and 4: x' = sum_i G_i(x) E_i(x) + x, E_i(x) = x0 * (U_i tanh(C_i tanh(V_i^T x)) + b), G softmax.

    Gates sum to one, so they may weigh the low-rank vectors before the up-projection: all experts together are then
    two matrix products of D x (experts * rank), and no [B, experts, D] is ever formed.
    """

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, width, rank))
        self.core = nn.Parameter(torch.empty(experts, rank, rank))
        self.up = nn.Parameter(torch.empty(experts, width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        for weights in (self.down, self.core, self.up):
            for expert in weights.data:
                nn.init.xavier_normal_(expert)

    def forward(self, first: Tensor, values: Tensor, gates: Tensor) -> Tensor:
        """[B, D] from x0 [B, D], x [B, D] and gates [B, experts] that sum to one."""
        experts, width, rank = self.down.shape
        low = torch.tanh(values @ self.down.transpose(0, 1).reshape(width, experts * rank))
        inner = torch.bmm(low.view(-1, experts, rank).transpose(0, 1), self.core.transpose(1, 2))
        mixed = torch.tanh(inner).transpose(0, 1) * gates.unsqueeze(2)
        up = self.up.transpose(0, 1).reshape(width, experts * rank)
        return values + first * F.linear(mixed.flatten(1), up, self.bias)


class CrossNet(nn.Module):
    """A stack of full-rank or low-rank layers; ``rank`` 0 is full rank."""

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            LowRankCrossLayer(width, rank) if rank else CrossLayer(width) for _ in range(layers)
        )

    def forward(self, first: Tensor) -> Tensor:
        """[B, D] from [B, D]."""
        values = first
        for layer in self.layers:
            values = layer(first, values)
        return values


class MixtureCrossNet(nn.Module):
    """A stack of mixtures of low-rank experts. The gates' weights are shared by the layers, as in the public codes."""

    def __init__(self, width: int, layers: int, rank: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.layers = nn.ModuleList(MixtureCrossLayer(width, rank, experts) for _ in range(layers))

    def forward(self, first: Tensor) -> Tensor:
        """[B, D] from [B, D]."""
        values = first
        for layer in self.layers:
            values = layer(first, values, self.gate(values).softmax(dim=1))
        return values
