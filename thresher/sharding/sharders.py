"""TorchRec's sharders, opened for every sharding type on every device.

TorchRec offers row-wise, table-row-wise and grid sharding on CUDA only, from the time when gloo had no reduce-scatter.
Rows are looked up and updated by our engine (``kernel.py``). Two faults of its sharded modules are mended here:

* they pool with the weights of a batch that an unweighted collection ignores; ours drop them first;
* where rows are cut, a mean is a sum divided after the exchange. TorchRec forgets the division under grid sharding,
  and divides the outputs of the collection's other tables too, whatever their pooling; ours divides where it must.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.distributed.embedding import EmbeddingCollectionContext, EmbeddingCollectionSharder
from torchrec.distributed.embedding import ShardedEmbeddingCollection as TorchrecShardedCollection
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, EmbeddingBagCollectionSharder
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection as TorchrecShardedBags
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ModuleSharder,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
)
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.optimizers import TableOptimizer, fused_params
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.tables import find_tables
from thresher.errors import PlanError
from thresher.sharding.cuts import BAG_TYPES, ROW_TYPES, SEQUENCE_TYPES
from thresher.sharding.engine import Engine
from thresher.sharding.logical import own_rows
from thresher.sharding.lookups import pooled_lookup, sequence_lookup
from thresher.sharding.replicate import replicate

CPU = torch.device("cpu")


class ShardedEmbeddingBagCollection(TorchrecShardedBags):  # type: ignore[misc]
    """TorchRec's over our engine, with weights and means as in an unsharded collection."""

    def __init__(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        sharder: "BagSharder",
        device: torch.device | None,
        fqn: str | None,
    ) -> None:
        _require_ours(module, fqn)
        self._engine = sharder.engine
        super().__init__(
            module,
            params,
            env,
            fused_params=sharder.fused_params,
            device=device or CPU,
            qcomm_codecs_registry=sharder.qcomm_codecs_registry,
            module_fqn=fqn,
        )
        divided, whole = _divided_features(module, params)
        self._pooling_type_to_rs_features = {PoolingType.MEAN.value: divided, PoolingType.SUM.value: whole}
        self._has_mean_pooling_callback = bool(divided)

    def _create_lookups(self) -> None:
        self._engine.prepare(self.module_sharding_plan.values(), self._env.process_group)
        path = self._module_fqn or ""
        self._lookups.extend(
            pooled_lookup(part, self._device, self._env, self._engine, path) for part in self._embedding_shardings
        )

    @staticmethod
    def _pre_load_state_dict_hook(
        self: "ShardedEmbeddingBagCollection", state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        kept = own_rows(self.embedding_bags, state_dict, f"{prefix}embedding_bags.")
        TorchrecShardedBags._pre_load_state_dict_hook(self, state_dict, prefix, *args)
        state_dict.update(kept)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor | LazyAwaitable[KeyedTensor]:
        """Pooled rows by key; on one rank without exchanges, which would be with itself."""
        if self._env.world_size > 1 or set(self._sharding_types) != {"table_wise"}:
            return super().forward(features)
        if not self._input_dists:
            self._create_input_dist(features.keys())
        ids = features if self._is_weighted else without_weights(features)
        if self._has_features_permute:
            ids = ids.permute(self._features_order, self._features_order_tensor)
        return KeyedTensor(self._embedding_names, self._embedding_dims, self._lookups[0](ids))

    def init_data_parallel(self) -> None:
        """Replicates the lookups of data-parallel tables as the dense part is replicated."""
        for number, sharding in enumerate(self._embedding_shardings):
            if isinstance(sharding, DpPooledEmbeddingSharding):
                self._lookups[number] = replicate(self._lookups[number], self._device, self._env.process_group)

    def input_dist(
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends ids to the owners of their rows."""
        return super().input_dist(ctx, features if self._is_weighted else without_weights(features))


class ShardedEmbeddingCollection(TorchrecShardedCollection):  # type: ignore[misc]
    """TorchRec's over our engine, deaf to weights in the batch."""

    def __init__(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        sharder: "SequenceSharder",
        device: torch.device | None,
        fqn: str | None,
    ) -> None:
        _require_ours(module, fqn)
        self._engine = sharder.engine
        super().__init__(
            module,
            params,
            env,
            fused_params=sharder.fused_params,
            device=device or CPU,
            qcomm_codecs_registry=sharder.qcomm_codecs_registry,
            module_fqn=fqn,
        )

    def _create_lookups(self) -> None:
        self._engine.prepare(self.module_sharding_plan.values(), self._env.process_group)
        path = self._module_fqn or ""
        self._lookups.extend(
            sequence_lookup(part, self._device, self._env, self._engine, path)
            for part in self._sharding_type_to_sharding.values()
        )

    @staticmethod
    def _pre_load_state_dict_hook(
        self: "ShardedEmbeddingCollection", state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        kept = own_rows(self.embeddings, state_dict, f"{prefix}embeddings.")
        TorchrecShardedCollection._pre_load_state_dict_hook(self, state_dict, prefix, *args)
        state_dict.update(kept)

    def input_dist(self, ctx: EmbeddingCollectionContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Sends ids to the owners of their rows."""
        return super().input_dist(ctx, without_weights(features))


class BagSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Shards ``EmbeddingBagCollection`` under all seven types; :func:`sharders` makes it."""

    def __init__(self, engine: Engine, codecs: dict[str, QuantizedCommCodecs]) -> None:
        super().__init__(fused_params=fused_params(engine.optimizer), qcomm_codecs_registry=codecs)
        self.engine = engine

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
        return ShardedEmbeddingBagCollection(module, params, env, self, device, module_fqn)

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingBagCollection]:
        """What ``shard`` returns."""
        return ShardedEmbeddingBagCollection


class SequenceSharder(EmbeddingCollectionSharder):  # type: ignore[misc]
    """Shards ``EmbeddingCollection`` under the types TorchRec has for it and that train on CPU; as above."""

    def __init__(self, engine: Engine, codecs: dict[str, QuantizedCommCodecs]) -> None:
        super().__init__(fused_params=fused_params(engine.optimizer), qcomm_codecs_registry=codecs)
        self.engine = engine

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
        return ShardedEmbeddingCollection(module, params, env, self, device, module_fqn)

    @property
    def sharded_module_type(self) -> type[ShardedEmbeddingCollection]:
        """What ``shard`` returns."""
        return ShardedEmbeddingCollection


def sharders(
    optimizer: TableOptimizer,
    *,
    model: nn.Module | None = None,
    tiers: TierConfig | None = None,
    dynamic: Mapping[str, DynamicTable] | None = None,
    seed: int = 0,
    codecs: dict[str, QuantizedCommCodecs] | None = None,
) -> list[ModuleSharder[nn.Module]]:
    """Both sharders, for TorchRec's planner and ``DistributedModelParallel``; make them anew for each model.

    Args:
        optimizer: of the tables; updates them in the backward.
        model: whose tables have tiers, unsharded.
        tiers: of rows; None, or no budget: all are fp32.
        dynamic: tables whose ids are raw, by name.
        seed: of tables with tiers: their initial values and rounding.
        codecs: of what ranks send each other, by exchange.

    Raises:
        ConfigError: the tiers do not fit the tables.
        PlanError: there are tiers but no model.
    """
    wanted = tiers is not None and tiers.enabled
    if wanted and model is None:
        raise PlanError("tiers depend on the tables of a model", where="sharders", fix="give model=, unsharded")
    infos = find_tables(model) if wanted and model is not None else ()
    engine = Engine(optimizer, seed, tiers if wanted else None, infos, dynamic or {})
    return [BagSharder(engine, codecs or {}), SequenceSharder(engine, codecs or {})]


def kernel_of(sharding_type: str) -> str:
    """``dense`` for replicated tables, else ``fused``: updated inside the backward."""
    return "dense" if sharding_type == "data_parallel" else "fused"


def _divided_features(
    module: EmbeddingBagCollection, params: dict[str, ParameterSharding]
) -> tuple[list[str], list[str]]:
    """Features whose pooled vectors are sums still to be divided by the bag's length, and all others."""
    divided: list[str] = []
    whole: list[str] = []
    for config in module.embedding_bag_configs():
        late = config.pooling is PoolingType.MEAN and params[config.name].sharding_type in ROW_TYPES
        (divided if late else whole).extend(config.feature_names)
    for feature in set(divided) & set(whole):
        raise PlanError(
            f"feature '{feature}' reads a mean-pooled table cut by rows and another table of the same collection",
            where="sharding",
            fix="give both tables types that do not cut rows, or put them into two collections",
        )
    return divided, whole


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


def _require_ours(module: EmbeddingBagCollection | EmbeddingCollection, path: str | None) -> None:
    """Refuses tables that were told of another optimizer or type than our engine would use."""
    configs = (
        module.embedding_bag_configs() if isinstance(module, EmbeddingBagCollection) else module.embedding_configs()
    )
    told = [name for name, parameter in module.named_parameters() if hasattr(parameter, "_optimizer_classes")]
    if told:
        raise PlanError(
            f"'{told[0]}' has an optimizer of its own (apply_optimizer_in_backward)",
            where=f"collection '{path or ''}'",
            fix="give the tables' optimizer to sharders(TableOptimizer(...)) instead",
        )
    for config in configs:
        if config.data_type is not DataType.FP32:
            raise PlanError(
                f"table '{config.name}' is of {config.data_type.value}",
                where=f"collection '{path or ''}'",
                fix="leave data_type FP32, and give rows other precisions by tiers",
            )
