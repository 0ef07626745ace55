"""The names inside torch and torchrec that the package leans on, beyond what they promise: a new pin must keep them."""

import inspect

import pytest
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.types import ShardedModule

SOURCES = [
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
def test_the_source_still_holds(owner: type, name: str, why: str) -> None:
    assert name in inspect.getsource(owner), f"{owner.__name__}: {name} ({why})"


def test_signatures_still_hold() -> None:
    shard = list(inspect.signature(EmbeddingBagCollectionSharder.shard).parameters)
    assert shard == ["self", "module", "params", "env", "device", "module_fqn"]
    names = list(inspect.signature(ShardedEmbeddingBagCollection.__init__).parameters)
    assert names[:5] == ["self", "module", "table_name_to_parameter_sharding", "env", "fused_params"]
    assert callable(ShardedModule.sharded_parameter_names)
    assert callable(ShardedTensor.local_shards)
