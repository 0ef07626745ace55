"""Multi-layer perceptron and its activations."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from thresher.settings import Settings
from thresher.zoo.blocks.losses import full_precision
from thresher.zoo.blocks.norm import BatchNorm

Activation = Literal["relu", "gelu", "silu", "tanh", "sigmoid", "prelu", "dice"]
Width = Annotated[int, Field(ge=1)]


class MlpConfig(Settings):
    """A perceptron's hidden layers; each is linear, batch norm (if any), activation, dropout.

    Attributes:
        hidden: widths; empty for no hidden layer.
        dropout: share of activations zeroed in training.
        batch_norm: normalise over the local batch before the activation.
    """

    hidden: tuple[Width, ...] = (256, 128)
    activation: Activation = "relu"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    batch_norm: bool = False


class Dice(nn.Module):
    """Data-adaptive activation (Zhou et al. 2018, equation 9): p x + (1 - p) alpha x, p = sigmoid of normalised x.

    eps and momentum of the normalisation are those of the authors' code and of FuxiCTR.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width, eps=1e-9, momentum=0.01, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """[N, D] from [N, D]; rows outside ``counted`` [N] bool do not enter the statistics."""
        p: Tensor = self.norm(values, counted).sigmoid()
        return values * torch.addcmul(self.alpha, p, 1 - self.alpha)


def _simple(function: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda width: function()


def activation(name: Activation, width: int) -> nn.Module:
    """The activation called ``name`` for ``width`` channels; PReLU and Dice learn one slope a channel."""
    makers: dict[Activation, Callable[[int], nn.Module]] = {
        "relu": lambda width: nn.ReLU(inplace=True),
        "gelu": _simple(nn.GELU),
        "silu": _simple(nn.SiLU),
        "tanh": _simple(nn.Tanh),
        "sigmoid": _simple(nn.Sigmoid),
        "prelu": lambda width: nn.PReLU(width),
        "dice": Dice,
    }
    return makers[name](width)


class Head(nn.Linear):
    """A linear layer that autocast leaves in float32: bfloat16 logits would tie samples less than 1 % apart."""

    def forward(self, values: Tensor) -> Tensor:
        """[N, outputs] in at least float32."""
        with torch.autocast(values.device.type, enabled=False):
            return super().forward(full_precision(values))


class Mlp(nn.Module):
    """Hidden layers of ``config``, then a linear layer of ``output`` units without activation; 0 for none.

    At least one of the two.

    Attributes:
        width: of the output.
    """

    def __init__(self, inputs: int, config: MlpConfig, output: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = inputs
        for units in config.hidden:
            layers.append(nn.Linear(width, units))
            layers += [BatchNorm(units)] if config.batch_norm else []
            layers.append(activation(config.activation, units))
            layers += [nn.Dropout(config.dropout)] if config.dropout else []
            width = units
        if output:
            layers.append(Head(width, output))
        self.layers = nn.ModuleList(layers)
        self.width = output or width

    def forward(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """[N, width] from [N, inputs]; rows outside ``counted`` [N] bool do not enter normalisation."""
        return self.after_first(self.layers[0](values), counted)

    @property
    def first(self) -> nn.Linear:
        """The first linear layer."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def after_first(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """The rest, from the first linear layer's output: for models that compute that layer another way."""
        for layer in self.layers[1:]:
            values = layer(values, counted) if isinstance(layer, BatchNorm | Dice) else layer(values)
        return values
