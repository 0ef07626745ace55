"""Pruning to the mean: a dropped field costs nothing more, and its vectors are one constant.

A dropped field's bags are emptied before they are sent: nothing is sent, looked up or updated. In the output its
columns hold the mean that its vectors had, for every sample, with or without ids: that is the change which the score
predicts, and dense layers keep their shapes.

                    batch              sent            pooled output
    user      [3]   [1]   [8]        [3] [1] [8]      u3   u1   u8
    colour    [7 2] [ ]   [4]        [ ] [ ] [ ]      m    m    m          m the mean of colour's vectors

Sequences keep their lengths, and every position reads the mean.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from thresher.embeddings.fields.field import Field, first_columns
from thresher.embeddings.fields.order import OutputOrder

KEPT = -1
"""In place of the step at which a field was dropped."""


class FieldPruner:
    """Which fields are dropped, and what stands in their place. The same on all ranks.

    Attributes:
        dropped_at: [F] int64, the step at which each field was dropped; -1 for fields that are kept.
        constants: [columns of all fields] fp32.
    """

    def __init__(self, fields: Sequence[Field], device: torch.device) -> None:
        self.fields = tuple(fields)
        self._firsts = first_columns(fields)
        self.dropped_at = torch.full((len(fields),), KEPT)
        self.constants = torch.zeros(self._firsts[-1], device=device)
        self._dropped: frozenset[int] = frozenset()
        self._gone = torch.zeros_like(self.constants, dtype=torch.bool)

    @property
    def dropped(self) -> frozenset[int]:
        """Numbers of the dropped fields."""
        return self._dropped

    def drop(self, fields: Collection[int], mean: Tensor, step: int) -> None:
        """From now on ``fields`` read their part of ``mean`` [columns of all fields]."""
        for number in fields:
            columns = slice(self._firsts[number], self._firsts[number + 1])
            self.constants[columns] = mean[columns]
            self.dropped_at[number] = step
        self._refresh()

    def restore(self, fields: Collection[int]) -> None:
        """Takes ``fields`` back, with the rows that their tables have."""
        for number in fields:
            self.constants[self._firsts[number] : self._firsts[number + 1]] = 0.0
            self.dropped_at[number] = KEPT
        self._refresh()

    def idle_tables(self, but: Collection[int] = ()) -> frozenset[str]:
        """Paths of the tables that only dropped fields read, those in ``but`` counted as not dropped."""
        gone = self.dropped.difference(but)
        kept = [field for number, field in enumerate(self.fields) if number not in gone]
        every = {table for field in self.fields for table in field.tables}
        return frozenset(every - {table for field in kept for table in field.tables})

    def emptied(self, module: str, ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """``ids`` for collection ``module``: the bags of dropped fields have no ids. ``ids`` itself if none is."""
        gone = {self.fields[number].feature for number in self.dropped if self.fields[number].module == module}
        return without_ids(ids, gone) if gone else ids

    def pooled(self, order: OutputOrder, values: Tensor) -> Tensor:
        """A pooled output [B, D] with constants in the columns of dropped fields; no gradient passes there."""
        gone = self._gone[order.columns]
        return torch.where(gone, self.constants[order.columns], values) if bool(gone.any()) else values

    def sequences(self, field: int, found: Mapping[str, JaggedTensor], lengths: Tensor) -> dict[str, JaggedTensor]:
        """A constant for each id of a dropped field, by output key; ``lengths`` [B] are those of the batch."""
        ids, first = int(lengths.sum()), self._firsts[field]
        constant = torch.split(
            self.constants[first : first + self.fields[field].width], list(self.fields[field].widths)
        )
        return {
            key: JaggedTensor(part.expand(ids, -1).to(found[key].values().dtype), lengths=lengths)
            for key, part in zip(self.fields[field].keys, constant, strict=True)
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Part of a model's weights: an evaluation needs it, too."""
        return {"dropped_at": self.dropped_at.clone(), "constants": self.constants.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self.dropped_at.copy_(state_dict["dropped_at"])
        self.constants.copy_(state_dict["constants"])
        self._refresh()

    def _refresh(self) -> None:
        self._dropped = frozenset(torch.nonzero(self.dropped_at != KEPT).flatten().tolist())
        self._gone.zero_()
        for number in self._dropped:
            self._gone[self._firsts[number] : self._firsts[number + 1]] = True


def without_ids(ids: KeyedJaggedTensor, gone: Collection[str]) -> KeyedJaggedTensor:
    """The same batch, but all bags of the keys ``gone`` are empty."""
    keys, ends = ids.keys(), ids.offset_per_key()
    kept = [slice(ends[n], ends[n + 1]) for n, key in enumerate(keys) if key not in gone]
    weights = ids.weights_or_none()
    lengths = ids.lengths().view(len(keys), -1).clone()
    lengths[[n for n, key in enumerate(keys) if key in gone]] = 0
    return KeyedJaggedTensor(
        keys=keys,
        values=_joined(ids.values(), kept),
        weights=None if weights is None else _joined(weights, kept),
        lengths=lengths.flatten(),
        stride=ids.stride(),
    )


def _joined(values: Tensor, parts: list[slice]) -> Tensor:
    return torch.cat([values[:0], *(values[part] for part in parts)])


def with_values(found: KeyedTensor, values: Tensor) -> KeyedTensor:
    """The same keys over other values."""
    return KeyedTensor(found.keys(), found.length_per_key(), values, key_dim=1)
