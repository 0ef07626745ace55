"""FBGEMM's row-wise Adagrad on CPU, led past two slow paths.

On CPU, FBGEMM updates the rows of a table that one feature reads by another code than those of a table that several
read. With row-wise Adagrad the first is 3 to 8 times slower than the second, which gives the same rows (to the last
bit or two: sums run in another order). So a table with one feature gets a second one here, whose bags are all empty
and whose part of the output is zero columns wide:

    features     a a     b b            widths   4 0   4 0
    bags of B    a []    b []           output   [ a | b ]      as without the second features

And its mean takes ten times as long as its sum, so a mean is a sum here, divided afterwards by the bag's length where
any bag has more than one id.
"""

from dataclasses import replace
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor
from torch.distributed import ProcessGroup
from torchrec import KeyedJaggedTensor, PoolingType
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import (
    BaseEmbeddingLookup,
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import pooling_type_to_pooling_mode


class CpuRowWiseAdagradBags(BatchedFusedEmbeddingBag):  # type: ignore[misc]
    """TorchRec's fused kernel for a group of tables; every table with one feature has an empty second one, all sum."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: ProcessGroup | None,
        device: torch.device | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> None:
        tables = config.embedding_tables
        doubled = [_with_empty_feature(table) for table in tables]
        summed = replace(config, embedding_tables=doubled, pooling=PoolingType.SUM)
        super().__init__(summed, pg, device, sharding_type, env)
        self._config = config
        self._divides = pooling_type_to_pooling_mode(config.pooling, sharding_type) is PoolingMode.MEAN
        widths = [width for table in tables for width in _widths(table)]
        self.emb_module.D_offsets.copy_(torch.tensor([0, *widths]).cumsum(0))
        self.emb_module.total_D = sum(widths)
        self._rows = torch.tensor(_sources(widths), device=device)
        self._widths = torch.tensor([width for width in widths if width], device=device)

    def forward(
        self,
        features: KeyedJaggedTensor,
        vbe_output: Tensor | None = None,
        vbe_output_offsets: Tensor | None = None,
    ) -> Tensor:
        """[B, sum of widths] pooled rows; gradients are applied to the tables in the backward."""
        assert vbe_output is None, "batches of different size per feature are not sharded here"
        weights = features.weights_or_none() if self._config.is_weighted else None
        offsets = self._with_empty_bags(features.offsets().to(self._embedding_table_offset_type))
        pooled: Tensor = self.emb_module(features.values().to(self._embedding_table_index_type), offsets, weights)
        return self._divided(pooled, features.lengths()) if self._divides else pooled

    def _with_empty_bags(self, offsets: Tensor) -> Tensor:
        """Offsets of all features' bags, [features * B + 1], from those of the features with ids."""
        read = self._widths.numel()
        size = (offsets.numel() - 1) // read
        ends = offsets[torch.arange(1, read + 1) * size]
        both = torch.cat([offsets[:-1].view(read, size), ends.unsqueeze(1).expand(-1, size)])
        return torch.cat([both[self._rows].flatten(), offsets[-1:]])

    def _divided(self, pooled: Tensor, lengths: Tensor) -> Tensor:
        """Means [B, sum of widths] from sums and the bags' lengths [features * B]."""
        if not lengths.numel() or int(lengths.max()) <= 1:
            return pooled
        counts = lengths.view(self._widths.numel(), -1).clamp(min=1).to(pooled.dtype)
        return pooled / counts.T.repeat_interleave(self._widths, dim=1)


class BagLookup(GroupedPooledEmbeddingsLookup):  # type: ignore[misc]
    """TorchRec's lookup with the kernel above where it helps."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> torch.nn.Module:
        fused = config.compute_kernel is EmbeddingComputeKernel.FUSED
        optimizer = (config.fused_params or {}).get("optimizer")
        if fused and optimizer is EmbOptimType.EXACT_ROWWISE_ADAGRAD and device is not None and device.type == "cpu":
            return CpuRowWiseAdagradBags(config, pg, device, sharding_type, env)
        kernel: torch.nn.Module = super()._create_embedding_kernel(config, device, pg, sharding_type, env)
        return kernel


def bag_lookup(sharding: Any, device: torch.device | None, env: ShardingEnv) -> BaseEmbeddingLookup:
    """The lookup of this rank's shards of one sharding type; data-parallel tables keep TorchRec's."""
    if isinstance(sharding, DpPooledEmbeddingSharding):
        kept: BaseEmbeddingLookup = sharding.create_lookup()
        return kept
    kind = None
    if isinstance(sharding, RwPooledEmbeddingSharding):
        kind = ShardingType.ROW_WISE
    elif isinstance(sharding, TwRwPooledEmbeddingSharding | GridPooledEmbeddingSharding):
        kind = ShardingType.TABLE_ROW_WISE
    return BagLookup(
        sharding._grouped_embedding_configs_per_rank[env.rank],
        device=device,
        pg=sharding._pg,
        sharding_type=kind,
        env=env,
    )


def _with_empty_feature(table: ShardedEmbeddingTable) -> ShardedEmbeddingTable:
    names = table.feature_names
    return replace(table, feature_names=[*names, f"no {names[0]}"]) if len(names) == 1 else table


def _widths(table: ShardedEmbeddingTable) -> list[int]:
    """Columns of the output for each feature of a table, the empty one included."""
    return [table.local_cols, 0] if len(table.feature_names) == 1 else [table.local_cols] * len(table.feature_names)


def _sources(widths: list[int]) -> list[int]:
    """Which row of [starts of F features, ends of F features] holds each feature's offsets, empty ones included."""
    read = sum(width > 0 for width in widths)
    sources: list[int] = []
    row = -1
    for width in widths:
        row += width > 0
        sources.append(row if width else read + row)
    return sources
