"""What TorchRec and checkpoints see of the optimizer of a group of tables."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.optim.fused import FusedOptimizer

from thresher.embeddings.group import TableGroup
from thresher.embeddings.kernels.backend import Sorted, Table
from thresher.embeddings.optimizers import STEP
from thresher.embeddings.rows.flat import FlatTable
from thresher.sharding.columns import RowSums


class CountingGroup(TableGroup):
    """A group whose numbers of updates are tensors where the optimizer counts them: a checkpoint loads into tensors.

    Attributes:
        stale: whether only the first column shards of rows have the right scalars.
    """

    stale = False

    @cached_property
    def counts(self) -> dict[str, Tensor]:
        """By name of the flat table the number of its updates; empty where the optimizer does not count them."""
        flat = [table.name for table in self.tables if isinstance(table, FlatTable)]
        return {name: torch.zeros(()) for name in flat} if self.optimizer.counts_steps else {}

    def update(self, found: Sorted, grad: Tensor) -> None:
        """See ``TableGroup``."""
        if self.stale and isinstance(self.exchange, RowSums):
            self.exchange.spread(self.tables)
        self.stale = False
        counted = [(table, self.counts[table.name]) for table in self.tables if table.name in self.counts]
        for table, count in counted:
            table.step = int(count)
        super().update(found, grad)
        for table, count in counted:
            count.fill_(table.step)


class GroupOptimizer(FusedOptimizer):  # type: ignore[misc]
    """The optimizer of a group; rows are updated in the backward, a step only passes the learning rate on.

    State is named as TorchRec's: ``<table>.momentum1`` and so on, tensors of the weight's shape or [rows]. Where
    columns are cut and a row has one scalar, it is shown once, by the rank of the first columns; kept apart, scalars
    of column shards follow each other, as in TorchRec. Tables with tiers show none: their state is part of their rows.

    Args:
        shards: in the order of the group's tables.
        weights: for each table what stands for its weights, [rows, columns].
    """

    def __init__(
        self,
        group: CountingGroup,
        shards: Sequence[ShardedEmbeddingTable],
        weights: Sequence[Tensor],
        pg: ProcessGroup | None,
    ) -> None:
        self._group, self._pg = group, pg
        self._once = isinstance(group.exchange, RowSums)
        params: dict[str, ShardedTensor] = {}
        state: dict[ShardedTensor, dict[str, Tensor | ShardedTensor]] = {}
        for name in dict.fromkeys(shard.name for shard in shards):
            numbers = [number for number, shard in enumerate(shards) if shard.name == name]
            parts = [shards[number] for number in numbers]
            whole = self._sharded(parts, [weights[number] for number in numbers])
            params[f"{name}.weight"] = whole
            state[whole] = self._state(name, parts, [group.tables[number] for number in numbers])
        super().__init__(params, state, [{"params": list(params.values()), "lr": group.lr}])

    def step(self, closure: None = None) -> None:
        """Passes the learning rate on."""
        self._group.lr = self.param_groups[0]["lr"]

    def zero_grad(self, set_to_none: bool = False) -> None:
        """As ``step``: there are no gradients."""
        self.step()

    def post_load_state_dict(self) -> None:
        """TorchRec calls it at the end of ``load_state_dict``."""
        self.loaded()

    def loaded(self) -> None:
        """To be called on all ranks after state was read: before the next update, scalars of rows go to all their
        column shards."""
        self._group.stale = isinstance(self._group.exchange, RowSums)

    def _state(
        self, name: str, shards: Sequence[ShardedEmbeddingTable], tables: Sequence[Table]
    ) -> dict[str, Tensor | ShardedTensor]:
        flat, optimizer = [table for table in tables if isinstance(table, FlatTable)], self._group.optimizer
        if not flat:
            return {}
        found: dict[str, Tensor | ShardedTensor] = {}
        for number, vector in enumerate(optimizer.vector_names):
            found[f"{name}.{vector}"] = self._sharded(shards, [table.vectors[number] for table in flat])
        if optimizer.has_scalar:
            found[f"{name}.{optimizer.scalar_name}"] = self._scalars(shards, [table.scalar for table in flat])
        if optimizer.counts_steps:
            found[f"{name}.{STEP}"] = self._group.counts[name]
        return found

    def _sharded(self, shards: Sequence[ShardedEmbeddingTable], tensors: Sequence[Tensor]) -> ShardedTensor:
        """Tensors of the weight's shape."""
        whole = shards[0].global_metadata
        local = [(tensor, shard.local_metadata) for tensor, shard in zip(tensors, shards, strict=True)]
        return self._tensor(local, whole.shards_metadata, whole.size)

    def _scalars(self, shards: Sequence[ShardedEmbeddingTable], tensors: Sequence[Tensor]) -> ShardedTensor:
        rows = shards[0].num_embeddings
        every = shards[0].global_metadata.shards_metadata
        columns = sorted({meta.shard_offsets[1] for meta in every})
        kept = columns[:1] if self._once else columns

        def place(meta: ShardMetadata) -> ShardMetadata:
            first = kept.index(meta.shard_offsets[1]) * rows + meta.shard_offsets[0]
            return ShardMetadata([first], [meta.shard_sizes[0]], meta.placement)

        local = [
            (tensor, place(shard.local_metadata))
            for tensor, shard in zip(tensors, shards, strict=True)
            if shard.local_metadata.shard_offsets[1] in kept
        ]
        placed = [place(meta) for meta in every if meta.shard_offsets[1] in kept]
        return self._tensor(local, placed, torch.Size([rows * len(kept)]))

    def _tensor(
        self, local: Sequence[tuple[Tensor, ShardMetadata]], every: list[ShardMetadata], size: torch.Size
    ) -> ShardedTensor:
        metadata = ShardedTensorMetadata(every, size, TensorProperties(dtype=torch.float32))
        found: ShardedTensor = ShardedTensor._init_from_local_shards_and_global_metadata(
            [Shard(tensor, meta) for tensor, meta in local], metadata, process_group=self._pg
        )
        return found
