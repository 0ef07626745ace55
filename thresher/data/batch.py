"""A batch: tensors and ragged tensors only, ready for a model."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torchrec import JaggedTensor, KeyedJaggedTensor


@dataclass(frozen=True)
class Batch:
    """B samples of a data set. Columns follow the schema's order.

    Samples of weight 0 count nowhere: they fill the last batch of a sweep, and stand where a bad row was dropped.

    Attributes:
        index: [B] int64, the sample's row number in its split (counted over the files in order).
        epoch: [B] int64, which pass over the data the sample belongs to.
        dense: [B, number of dense features] float32.
        sparse: ids of sparse features, sequences and their id side columns; keys are ``schema.id_tables``;
            int64 values; weights where a feature declares them (1.0 for the others).
        side: float side columns by key, ragged like their sequence; float32 values.
        labels: [B, number of labels] float32.
        weight: [B] float32.
        group: [B] int64; zeros without a group feature.
        time: [B] int64, seconds since 1970; zeros without a time feature.
    """

    index: Tensor
    epoch: Tensor
    dense: Tensor
    sparse: KeyedJaggedTensor
    side: dict[str, JaggedTensor]
    labels: Tensor
    weight: Tensor
    group: Tensor
    time: Tensor

    @property
    def size(self) -> int:
        """B, samples of weight 0 included."""
        return self.index.numel()

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return replace(self, **{f.name: _move(getattr(self, f.name), device, non_blocking) for f in fields(self)})


def _move(value: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(value, dict):
        return {key: part.to(device, non_blocking=non_blocking) for key, part in value.items()}
    return value.to(device, non_blocking=non_blocking)
