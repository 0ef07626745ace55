"""TorchRec's lookups with our kernel in them; replicated tables keep TorchRec's dense one."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import BaseEmbeddingLookup, EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingSharding
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import PoolingMode, pooling_type_to_pooling_mode

from thresher.embeddings.kernels.bags import Pooling
from thresher.sharding.engine import Engine
from thresher.sharding.kernel import TableKernel

_POOLINGS = {PoolingMode.SUM: Pooling.SUM, PoolingMode.MEAN: Pooling.MEAN}


class PooledLookup(GroupedPooledEmbeddingsLookup):  # type: ignore[misc]
    """Pooled vectors of this rank's shards of one sharding type."""

    def __init__(self, sharding: Any, device: torch.device, env: ShardingEnv, engine: Engine, module: str) -> None:
        self._engine, self._module = engine, module
        kind = None
        if isinstance(sharding, RwPooledEmbeddingSharding):
            kind = ShardingType.ROW_WISE
        elif isinstance(sharding, TwRwPooledEmbeddingSharding | GridPooledEmbeddingSharding):
            kind = ShardingType.TABLE_ROW_WISE
        configs = sharding._grouped_embedding_configs_per_rank[env.rank]
        super().__init__(configs, device=device, pg=sharding._pg, sharding_type=kind, env=env)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device,
        pg: ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> BaseEmbedding:
        if stock(config, device, self._engine, self._module):
            return super()._create_embedding_kernel(config, device, pg, sharding_type, env)
        staggered = sharding_type is ShardingType.TABLE_ROW_WISE
        context = self._engine.staggered if staggered else self._engine.in_order
        pooling = _POOLINGS[pooling_type_to_pooling_mode(config.pooling, sharding_type)]
        return TableKernel(config, pooling, pg, device, self._engine, context, self._module)

    def _forward_with_vbe_merging(self, features_by_group: list[KeyedJaggedTensor], device: torch.device) -> Tensor:
        """Batches of different size per feature over several kernels: TorchRec's way without a common output."""
        merged: Tensor = self._merge_variable_batch_embeddings(
            self._forward(features_by_group), self._vbe_splits(features_by_group)
        )
        return merged


class SequenceLookup(GroupedEmbeddingsLookup):  # type: ignore[misc]
    """Vectors of single ids from this rank's shards of one sharding type."""

    def __init__(self, sharding: Any, device: torch.device, env: ShardingEnv, engine: Engine, module: str) -> None:
        self._engine, self._module = engine, module
        configs = sharding._grouped_embedding_configs_per_rank[env.rank]
        super().__init__(configs, pg=sharding._pg, device=device, env=env)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: ProcessGroup | None,
        device: torch.device,
        env: ShardingEnv | None = None,
    ) -> BaseEmbedding:
        if stock(config, device, self._engine, self._module):
            return super()._create_embedding_kernel(config, pg, device, env)
        return TableKernel(config, Pooling.NONE, pg, device, self._engine, self._engine.in_order, self._module)


def pooled_lookup(
    sharding: Any, device: torch.device, env: ShardingEnv, engine: Engine, module: str
) -> BaseEmbeddingLookup:
    """The lookup of this rank's shards of one sharding type of an EmbeddingBagCollection at ``module``."""
    if isinstance(sharding, DpPooledEmbeddingSharding):
        return sharding.create_lookup()
    return PooledLookup(sharding, device, env, engine, module)


def sequence_lookup(
    sharding: Any, device: torch.device, env: ShardingEnv, engine: Engine, module: str
) -> BaseEmbeddingLookup:
    """The same of an EmbeddingCollection."""
    if isinstance(sharding, DpSequenceEmbeddingSharding):
        return sharding.create_lookup()
    return SequenceLookup(sharding, device, env, engine, module)


def stock(config: GroupedEmbeddingConfig, device: torch.device, engine: Engine, module: str) -> bool:
    """Whether a group of tables gets TorchRec's kernel."""
    dense = config.compute_kernel is EmbeddingComputeKernel.DENSE
    return dense or engine.leaves_to_fbgemm(config.embedding_tables, module, device)
