"""TorchRec's sharders, opened for every sharding type on every device.

TorchRec offers row-wise, table-row-wise and grid sharding on CUDA only, from the time when gloo had no reduce-scatter.
Its sharded modules also pool with the weights of a batch that an unweighted collection ignores; ours drop them first.
"""

from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionContext, EmbeddingCollectionSharder
from torchrec.distributed.embedding import ShardedEmbeddingCollection as TorchrecShardedCollection
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, EmbeddingBagCollectionSharder
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection as TorchrecShardedBags
from torchrec.distributed.types import Awaitable, ModuleSharder, ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from thresher.embeddings.optimizers import TableOptimizer, fused_params
from thresher.sharding.cuts import BAG_TYPES, SEQUENCE_TYPES


class ShardedEmbeddingBagCollection(TorchrecShardedBags):  # type: ignore[misc]
    """TorchRec's, deaf to weights in the batch where the collection is unweighted."""

    def input_dist(
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends ids to the owners of their rows."""
        return super().input_dist(ctx, features if self._is_weighted else without_weights(features))


class ShardedEmbeddingCollection(TorchrecShardedCollection):  # type: ignore[misc]
    """TorchRec's, deaf to weights in the batch."""

    def input_dist(self, ctx: EmbeddingCollectionContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Sends ids to the owners of their rows."""
        return super().input_dist(ctx, without_weights(features))


class BagSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Shards ``EmbeddingBagCollection`` under all seven types."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All types, whatever the device."""
        return list(BAG_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """One kernel a type."""
        return [kernel_of(sharding_type)]

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """The collection's shards on this rank."""
        return ShardedEmbeddingBagCollection(
            module, params, env, fused_params=self.fused_params, device=device, module_fqn=module_fqn
        )

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        """What ``shard`` returns."""
        return ShardedEmbeddingBagCollection


class SequenceSharder(EmbeddingCollectionSharder):  # type: ignore[misc]
    """Shards ``EmbeddingCollection`` under the types TorchRec has for it and that train on CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Table-, column- and row-wise."""
        return list(SEQUENCE_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """One kernel a type."""
        return [kernel_of(sharding_type)]

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        """The collection's shards on this rank."""
        return ShardedEmbeddingCollection(
            module, params, env, fused_params=self.fused_params, device=device, module_fqn=module_fqn
        )

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingCollection]:
        """What ``shard`` returns."""
        return ShardedEmbeddingCollection


def sharders(optimizer: TableOptimizer) -> list[ModuleSharder[nn.Module]]:
    """Both sharders; tables are updated by ``optimizer``."""
    params: dict[str, Any] = fused_params(optimizer)
    return [BagSharder(fused_params=params), SequenceSharder(fused_params=params)]


def kernel_of(sharding_type: str) -> str:
    """``dense`` for replicated tables, else ``fused``: updated inside the backward."""
    return "dense" if sharding_type == "data_parallel" else "fused"


def without_weights(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same ids without their weights; ``features`` itself where it has none."""
    if features.weights_or_none() is None:
        return features
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        offsets=features.offsets(),
        stride=features.stride(),
    )
