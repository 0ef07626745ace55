"""Our engine in the place of TorchRec's fused kernel: one group of tables of a collection on this rank."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_kernel import BaseEmbedding, get_state_dict
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizerModule

from thresher.embeddings.group import StepContext, TableGroup
from thresher.embeddings.kernels.backend import Table, pick_backend
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.rows.flat import FlatTable
from thresher.sharding.engine import Engine
from thresher.sharding.logical import LogicalRows, Window
from thresher.sharding.states import CountingGroup, GroupOptimizer


class TableKernel(BaseEmbedding, FusedOptimizerModule):  # type: ignore[misc]
    """Looks a group of tables up; the backward updates their rows.

    As in TorchRec, fp32 tables start uniform between the bounds of their configuration, from torch's generator.

    Args:
        module: path of the collection in the model.
        pooling: of the group on this rank: where rows are cut, means are divided elsewhere, and are sums here.

    Attributes:
        group: the tables.
        module: as given.

    Raises:
        PlanError: a table is not fp32.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pooling: Pooling,
        pg: ProcessGroup | None,
        device: torch.device,
        engine: Engine,
        context: StepContext,
        module: str,
    ) -> None:
        super().__init__()
        shards = config.embedding_tables
        self._config, self._pg, self.module = config, pg, module
        tables, backend = engine.tables(shards, module, device), pick_backend(device)
        self.group = CountingGroup(
            tables,
            [number for number, shard in enumerate(shards) for _ in shard.feature_names],
            pooling,
            engine.optimizer,
            backend,
            context,
            engine.exchange(shards),
            engine.dynamic_rows(shards, tables, backend),
        )
        for shard, table in zip(shards, tables, strict=True):
            if isinstance(table, FlatTable):
                table.weights.uniform_(shard.get_weight_init_min(), shard.get_weight_init_max())
        self._optimizer = GroupOptimizer(self.group, shards, self.split_embedding_weights(), pg)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Pooled [B, sum of widths], or [ids, width]; 1-D where bags differ in number, rank after rank."""
        weights = features.weights_or_none() if self._config.is_weighted else None
        ids, offsets = features.values(), features.offsets().long()
        if not features.variable_stride_per_key():
            return self.group(ids, offsets, weights)
        return self._by_rank(self.group(ids, offsets, weights, features.stride_per_key()), features)

    def _by_rank(self, vectors: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """1-D: for each rank, for each feature, the vectors of its bags; TorchRec's order for batches of many sizes."""
        widths, sizes = self._config.embedding_dims(), features.stride_per_key()
        if vectors.dim() == 2:
            each = torch.split(vectors, widths, dim=1)
        else:
            each = torch.split(vectors, [size * width for size, width in zip(sizes, widths, strict=True)])
        strides = features.stride_per_key_per_rank()
        parts = [
            torch.split(feature.reshape(size, width), stride)
            for feature, size, width, stride in zip(each, sizes, widths, strides, strict=True)
        ]
        return torch.cat([part.reshape(-1) for rank in zip(*parts, strict=True) for part in rank])

    @property
    def config(self) -> GroupedEmbeddingConfig:
        """The tables as TorchRec describes them."""
        return self._config

    @property
    def emb_module(self) -> TableGroup:
        """What does the work."""
        return self.group

    @property
    def fused_optimizer(self) -> GroupOptimizer:
        """The group's optimizer."""
        return self._optimizer

    def split_embedding_weights(self) -> list[Tensor]:
        """For each table [rows, columns]."""
        return [_shown(table) for table in self.group.tables]

    def named_split_embedding_weights(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The same by ``<table>.weight``."""
        start = f"{prefix}." if prefix else ""
        for shard, weights in zip(self._config.embedding_tables, self.split_embedding_weights(), strict=True):
            yield f"{start}{shard.name}.weight", weights

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that no other optimizer may take."""
        for name, weights in self.named_split_embedding_weights(prefix, recurse, remove_duplicate):
            yield name, _updated_in_backward(weights)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """None."""
        yield from ()

    def named_parameters_by_table(self) -> Iterator[tuple[str, nn.Parameter]]:
        """One parameter a table, with all its shards on this rank one below the other."""
        named = self.named_split_embedding_weights()
        for name, parts in groupby(named, key=lambda pair: pair[0]):
            yield name.removesuffix(".weight"), _updated_in_backward(_together([part for _, part in parts]))

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """ShardedTensors by ``<table>.weight``."""
        shards: dict[str, Any] = get_state_dict(
            self._config.embedding_tables, self.split_embedding_weights(), self._pg, destination, prefix
        )
        return shards

    def flush(self) -> None:
        """Nothing is cached."""

    def purge(self) -> None:
        """Nothing is cached."""


def _updated_in_backward(weights: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weights)
    parameter._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
    return parameter


def _shown(table: Table) -> Tensor:
    return table.weights if isinstance(table, FlatTable) else LogicalRows([Window(table, 0, table.rows)])


def _together(parts: list[Tensor]) -> Tensor:
    """[sum of rows, columns]: the parts one below the other, without a copy; flat ones lie so in memory."""
    tiered = [part for part in parts if isinstance(part, LogicalRows)]
    if tiered:
        return LogicalRows([window for part in tiered for window in part.windows])
    rows, cols = sum(len(part) for part in parts), parts[0].shape[1]
    return parts[0].as_strided((rows, cols), (cols, 1))
