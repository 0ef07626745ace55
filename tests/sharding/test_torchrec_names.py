"""The names inside torch and torchrec that the package leans on, beyond what they promise: a new pin must keep them."""

import inspect

import pytest
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel, dist_data, embedding_kernel
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.sharding.twrw_sharding import TwRwSparseFeaturesDist
from torchrec.distributed.types import ShardedModule
from torchrec.optim.keyed import KeyedOptimizer

SOURCES = [
    (ShardedEmbeddingBagCollection, "for sharding in self._embedding_shardings:", "lookups are made of them"),
    (ShardedEmbeddingBagCollection, "self._create_lookups()", "overridden"),
    (ShardedEmbeddingBagCollection, "_pre_load_state_dict_hook", "overridden: rows with tiers are not copied"),
    (ShardedEmbeddingBagCollection, "self._module_fqn = module_fqn", "path of the tables"),
    (ShardedEmbeddingBagCollection, "lookup.named_parameters_by_table()", "one parameter a table"),
    (ShardedEmbeddingBagCollection, "tbe_module.fused_optimizer.params.items()", "renamed there"),
    (ShardedEmbeddingCollection, "self._create_lookups()", "overridden"),
    (ShardedEmbeddingCollection, "_pre_load_state_dict_hook", "overridden"),
    (ShardedEmbeddingCollection, "self._sharding_type_to_sharding.values()", "lookups are made of them"),
    (GroupedPooledEmbeddingsLookup, "def _create_embedding_kernel", "overridden"),
    (GroupedPooledEmbeddingsLookup, "self._emb_modules", "searched for our kernels"),
    (GroupedPooledEmbeddingsLookup, "def _forward_with_vbe_merging", "overridden"),
    (GroupedPooledEmbeddingsLookup, "def _merge_variable_batch_embeddings", "instead of it"),
    (GroupedEmbeddingsLookup, "def _create_embedding_kernel", "overridden"),
    (TwRwSparseFeaturesDist, "stagger=self._num_cross_nodes", "the order of ranks in an owner's batch"),
    (dist_data, "x + num_splits // stagger * y", "that order"),
    (BaseEmbedding, "def forward", "our kernel is one"),
    (embedding_kernel, "def get_state_dict", "shards by table"),
    (KeyedOptimizer, "self.post_load_state_dict()", "where row state goes to all column shards"),
    (ShardedEmbeddingBagCollection, "_pooling_type_to_rs_features", "features divided after the exchange"),
    (ShardedEmbeddingBagCollection, "_has_mean_pooling_callback", "whether any is"),
    (ShardedEmbeddingBagCollection, "_embedding_shardings", "walked to replicate data-parallel lookups"),
    (ShardedEmbeddingBagCollection, "self._lookups[i] =", "replaced by their replicated selves"),
    (ShardedEmbeddingBagCollection, "self._is_weighted", "whether weights count"),
    (ShardedEmbeddingBagCollection, "def init_data_parallel", "overridden"),
    (ShardedEmbeddingBagCollection, "def input_dist", "overridden"),
    (DistributedModelParallel, "_dmp_wrapped_module", "wrapped for data parallelism"),
    (DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model", "leaves tables alone"),
    (DistributedDataParallel, "parameters_to_ignore", "read back"),
    (DistributedDataParallel, "self.reducer.prepare_for_backward([])", "starts the backward of zeros"),
    (DistributedDataParallel, "self.reducer._rebuild_buckets()", "what that backward is for"),
    (EmbeddingEnumerator, "set(constrained_sharding_types)", "why options are sorted"),
]


@pytest.mark.parametrize(("owner", "name", "why"), SOURCES, ids=lambda value: str(value)[:40])
def test_the_source_still_holds(owner: object, name: str, why: str) -> None:
    assert name in inspect.getsource(owner), f"{owner}: {name} ({why})"


def test_signatures_still_hold() -> None:
    shard = list(inspect.signature(EmbeddingBagCollectionSharder.shard).parameters)
    assert shard == ["self", "module", "params", "env", "device", "module_fqn"]
    pooled = list(inspect.signature(GroupedPooledEmbeddingsLookup._create_embedding_kernel).parameters)
    assert pooled == ["self", "config", "device", "pg", "sharding_type", "env"]
    single = list(inspect.signature(GroupedEmbeddingsLookup._create_embedding_kernel).parameters)
    assert single == ["self", "config", "pg", "device", "env"]
    assert list(inspect.signature(embedding_kernel.get_state_dict).parameters)[:3] == [
        "embedding_tables",
        "params",
        "pg",
    ]
    names = list(inspect.signature(ShardedEmbeddingBagCollection.__init__).parameters)
    assert names[:5] == ["self", "module", "table_name_to_parameter_sharding", "env", "fused_params"]
    assert callable(ShardedModule.sharded_parameter_names)
    assert callable(ShardedTensor.local_shards)
