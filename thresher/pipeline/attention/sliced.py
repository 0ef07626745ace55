"""What the layers of a trunk see of one slice."""

from functools import cached_property

import torch
from torch import Tensor

from thresher.errors import ConfigError
from thresher.pipeline.attention.dropout import DropKey, keyed_dropout
from thresher.pipeline.attention.pointwise import sliced_pointwise
from thresher.pipeline.attention.port import Port
from thresher.pipeline.attention.segments import Group, group
from thresher.pipeline.attention.softmax import sliced_softmax
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.context import RelativeBias, SliceContext
from thresher.pipeline.microbatch import Microbatch


class SlicedContext(SliceContext):
    """One slice of a microbatch, with the keys and values of earlier ones in a store.

    Attributes:
        port: the line to the rank that shares the attention of the operation under way; None where none does. To be set
            before the forward and again before the backward, which may recompute the forward.
    """

    port: Port | None

    def __init__(
        self, store: KVStore, microbatch: Microbatch, number: int, index: int, *, seed: int, step: int, training: bool
    ) -> None:
        """
        Args:
            store: of the chunk that the layers belong to.
            microbatch: all of it.
            number: of the microbatch in the step.
            index: of the slice in the microbatch.
            seed, step: what dropout depends on besides.
            training: whether there is dropout.
        """
        self.store, self.microbatch, self.number, self.index = store, microbatch, number, index
        self.seed, self.step, self.training = seed, step, training
        self.layout = microbatch.layout
        self.port = None
        self._pieces: dict[torch.device, list[Group]] = {}
        self._attended: set[int] = set()

    @cached_property
    def positions(self) -> Tensor:
        return self.layout.positions(self.index, self.microbatch.inputs.device)

    def pieces(self, device: torch.device) -> list[Group]:
        """The calls in which the slice attends to itself."""
        if device not in self._pieces:
            self._pieces[device] = group(self.layout.segments(self.index), device)
        return self._pieces[device]

    def again(self) -> None:
        """To be called before the backward: what it recomputes attends once more."""
        self._attended.clear()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._enter(layer)
        return sliced_softmax(self, layer, *cast_inputs(query, key, value))

    def attend_pointwise(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None
    ) -> Tensor:
        self._enter(layer)
        return sliced_pointwise(self, layer, *cast_inputs(query, key, value), bias)

    def _enter(self, layer: int) -> None:
        """Refuses a second attention under one index: its keys and values would take the place of the first's."""
        if layer in self._attended:
            raise ConfigError(
                f"layer {layer} attends twice", where="pipeline", fix="give each attention an index of its own"
            )
        self._attended.add(layer)

    def drop(self, values: Tensor, share: float, layer: int, site: int = 0) -> Tensor:
        if not self.training:
            return values
        key = DropKey(self.seed, self.step, self.number, self.index, layer, site)
        return keyed_dropout(values, share, [key], [self.layout.length(self.index)])


def cast_inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in the dtype that autocast gives to attention on their device; as they are without autocast."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)
