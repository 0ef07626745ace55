"""A block of rows to a batch of tensors."""

import numpy as np
import torch
from torch import Tensor
from torchrec import JaggedTensor, KeyedJaggedTensor

from thresher.data.batch import Batch
from thresher.data.block import Array, Block
from thresher.data.columns import columns_of
from thresher.data.schema import Schema


class Collator:
    """Makes batches of B rows for one schema.

    Where every feature has one id a row, lengths and offsets are the same for every batch: one tensor serves all.
    """

    def __init__(self, schema: Schema, batch_size: int) -> None:
        self._schema, self._size = schema, batch_size
        self._keys = list(schema.id_tables)
        self._one_id = {f.name: i for i, f in enumerate([f for f in schema.sparse if not f.many])}
        self._weights = {f.name: f"{f.name}.weights" for f in schema.sparse if f.weights}
        self._partner = {c.name: c.partner or c.name for c in columns_of(schema)}
        self._fixed = len(self._one_id) == len(self._keys)
        total = len(self._keys) * batch_size
        self._ones = torch.ones(total, dtype=torch.int32)
        self._steps = torch.arange(total + 1, dtype=torch.int32)

    def batch(self, block: Block, epoch: Array) -> Batch:
        """A batch of the B rows of ``block``, of which each belongs to a pass over the data.

        Args:
            epoch: [B] int64.
        """
        dense, labels = len(self._schema.dense), len(self._schema.labels)
        floats = torch.from_numpy(block.floats)
        weight = torch.ones(self._size) if self._schema.weight is None else floats[:, dense + labels].clone()
        if block.void.any():
            weight[torch.from_numpy(block.void)] = 0.0
        return Batch(
            index=torch.tensor(block.numbers),
            epoch=torch.tensor(epoch),
            dense=floats[:, :dense].contiguous(),
            sparse=self._fixed_ids(block) if self._fixed else self._ragged_ids(block),
            side={key: self._side(block, key) for key in self._schema.float_side_keys},
            labels=floats[:, dense : dense + labels].contiguous(),
            weight=weight,
            group=self._int(block, self._schema.group is not None, -1),
            time=self._int(block, self._schema.time is not None, 0),
        )

    def _fixed_ids(self, block: Block) -> KeyedJaggedTensor:
        """F features of one id a row: values are the columns of ``block.ids`` end to end."""
        values = np.empty((len(self._keys), self._size), dtype=np.int64)
        np.copyto(values, block.ids.T)
        size = self._size
        return KeyedJaggedTensor(
            self._keys,
            torch.from_numpy(values.reshape(-1)),
            lengths=self._ones,
            offsets=self._steps,
            stride=size,
            length_per_key=[size] * len(self._keys),
            offset_per_key=list(range(0, size * len(self._keys) + 1, size)),
        )

    def _ragged_ids(self, block: Block) -> KeyedJaggedTensor:
        lengths = np.ones((len(self._keys), self._size), dtype=np.int32)
        parts: list[Array] = []
        weights: list[Array] = []
        for key, line in zip(self._keys, lengths, strict=True):
            if key in self._one_id:
                parts.append(block.ids[:, self._one_id[key]])
            else:
                lists = block.lists[self._partner[key]]
                line[:] = lists.lengths
                parts.append(lists.values[key])
            if key in self._weights:
                weights.append(block.lists[key].values[self._weights[key]])
            elif self._weights:
                weights.append(np.ones(len(parts[-1]), dtype=np.float32))
        sizes = [len(part) for part in parts]
        values = np.empty(sum(sizes), dtype=np.int64)
        np.concatenate(parts, out=values, casting="same_kind")
        return KeyedJaggedTensor(
            self._keys,
            torch.from_numpy(values),
            weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
            lengths=torch.from_numpy(lengths.reshape(-1)),
            stride=self._size,
            length_per_key=sizes,
            offset_per_key=[0, *np.cumsum(sizes).tolist()],
        )

    def _side(self, block: Block, key: str) -> JaggedTensor:
        lists = block.lists[self._partner[key]]
        return JaggedTensor(values=torch.tensor(lists.values[key]), lengths=torch.tensor(lists.lengths))

    def _int(self, block: Block, present: bool, line: int) -> Tensor:
        return torch.tensor(block.ints[:, line]) if present else torch.zeros(self._size, dtype=torch.int64)
