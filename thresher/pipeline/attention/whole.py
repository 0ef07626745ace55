"""The reference that slices are compared with: a whole microbatch at once, by torch's own attention."""

from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from thresher.pipeline.attention.dropout import DropKey, keyed_dropout
from thresher.pipeline.attention.groups import require_groups
from thresher.pipeline.attention.pointwise import whole_pointwise
from thresher.pipeline.context import RelativeBias, SliceContext
from thresher.pipeline.microbatch import Microbatch


class WholeContext(SliceContext):
    """All slices of a microbatch at once. Dropout draws the masks of its slices, so it equals a sliced run."""

    def __init__(self, microbatch: Microbatch, number: int, *, seed: int, step: int, training: bool) -> None:
        """
        Args:
            microbatch: all of it.
            number: of the microbatch in the step.
            seed, step: what dropout depends on besides.
            training: whether there is dropout.
        """
        self.microbatch, self.number = microbatch, number
        self.seed, self.step, self.training = seed, step, training
        self.layout = microbatch.layout

    @cached_property
    def positions(self) -> Tensor:
        device = self.microbatch.inputs.device
        return torch.cat([self.layout.positions(index, device) for index in range(self.layout.slices)])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        require_groups(query, key, value)
        edges = [*self.layout.starts, self.layout.tokens]
        lengths = [stop - start for start, stop in pairwise(edges)]
        sequences = zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True)
        grouped = query.shape[1] != key.shape[1]
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in sequences]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def attend_pointwise(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None
    ) -> Tensor:
        return whole_pointwise(self, layer, query, key, value, bias)

    def drop(self, values: Tensor, share: float, layer: int, site: int = 0) -> Tensor:
        if not self.training:
            return values
        slices = range(self.layout.slices)
        keys = [DropKey(self.seed, self.step, self.number, index, layer, site) for index in slices]
        return keyed_dropout(values, share, keys, [self.layout.length(index) for index in slices])
