"""Layers that keep less for backward and compute it again."""

from collections.abc import Callable
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thresher.errors import ConfigError
from thresher.pipeline.context import SliceContext

Out = TypeVar("Out")

Recompute = Literal["none", "full", "selective"]
"""What of a layer is computed again in backward.

    none       nothing
    full       all of it; only the layer's input stays
    selective  all but attention: its input and output stay, norms, projections and the feed-forward part do not
"""


@runtime_checkable
class PartedLayer(Protocol):
    """A layer that is ``finish(values, mix(*project(values, context), context), context)``."""

    index: int

    def project(self, values: Tensor, context: SliceContext) -> tuple[Tensor, ...]:
        """Queries, keys, values (and whatever else attention needs) from [B, T, D]."""

    def mix(self, projected: tuple[Tensor, ...], context: SliceContext) -> Tensor:
        """Attention, and nothing else: the only part that calls ``context.attend`` or its like."""

    def finish(self, values: Tensor, mixed: Tensor, context: SliceContext) -> Tensor:
        """[B, T, D] from the layer's input and what attention returned."""


def recomputed(layer: nn.Module, values: Tensor, context: SliceContext, kind: Recompute = "none") -> Tensor:
    """``layer(values, context)``, [B, T, D] from [B, T, D], keeping for backward what ``kind`` says.

    Keys and values stay in the store of ``context`` whatever the kind: computing a layer again writes the same ones
    again. Dropout needs no state of a generator, it is a function of the slice. Where attention is shared between ranks
    (exchange), ``full`` shares it again with the peer of the backward operation, ``selective`` does not.

    Raises:
        ConfigError: the kind is unknown, or ``selective`` of a layer that is not made of parts.
    """
    whole: Callable[[Tensor, SliceContext], Tensor] = layer
    if kind == "none":
        return whole(values, context)
    if kind == "full":
        return _again(whole, values, context)
    require_recomputable(layer, kind)
    assert isinstance(layer, PartedLayer)
    mixed = layer.mix(_again(layer.project, values, context), context)
    return _again(layer.finish, values, mixed, context)


def require_recomputable(layer: nn.Module, kind: Recompute) -> None:
    """Refuses a kind that ``layer`` cannot follow.

    Raises:
        ConfigError: see :func:`recomputed`.
    """
    if kind not in get_args(Recompute):
        allowed = ", ".join(get_args(Recompute))
        raise ConfigError(
            f"'{kind}' is no kind of recomputation", where="pipeline.recompute", fix=f"use one of {allowed}"
        )
    if kind == "selective" and not isinstance(layer, PartedLayer):
        raise ConfigError(
            f"{type(layer).__name__} cannot keep its attention alone: it is not made of project, mix and finish",
            where="pipeline.recompute",
            fix="use 'full' or 'none', or give the layer these three methods",
        )


def _again(part: Callable[..., Out], *args: object) -> Out:
    output: Out = checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
    return output
