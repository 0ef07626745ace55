"""The CPU kernel for row-wise Adagrad against TorchRec's stock one: outputs, rows, state, over unlike tables."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torchrec import KeyedJaggedTensor, PoolingType
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.modules.embedding_configs import DataType

from tests.multi.harness import run_ranks
from thresher.embeddings.optimizers import TableOptimizer, fused_params
from thresher.sharding.bags import BagLookup, CpuRowWiseAdagradBags

TABLES = {"one": (7, 4, ["a"]), "shared": (5, 8, ["b", "c"]), "wide": (9, 12, ["d"])}
KEYS = ["a", "b", "c", "d"]
CPU = torch.device("cpu")


def whole(rows: int, dim: int) -> ShardMetadata:
    return ShardMetadata([0, 0], [rows, dim], "rank:0/cpu")


def group(pooling: PoolingType, weighted: bool, optimizer: str = "rowwise_adagrad") -> GroupedEmbeddingConfig:
    tables = [
        ShardedEmbeddingTable(
            num_embeddings=rows,
            embedding_dim=dim,
            name=name,
            data_type=DataType.FP32,
            feature_names=names,
            pooling=pooling,
            is_weighted=weighted,
            local_rows=rows,
            local_cols=dim,
            compute_kernel=EmbeddingComputeKernel.FUSED,
            local_metadata=whole(rows, dim),
            global_metadata=ShardedTensorMetadata([whole(rows, dim)], torch.Size([rows, dim])),
        )
        for name, (rows, dim, names) in TABLES.items()
    ]
    params = fused_params(TableOptimizer(name=optimizer, lr=0.1))
    return GroupedEmbeddingConfig(
        data_type=DataType.FP32,
        pooling=pooling,
        is_weighted=weighted,
        has_feature_processor=False,
        compute_kernel=EmbeddingComputeKernel.FUSED,
        embedding_tables=tables,
        fused_params=params,
    )


def ids(size: int, most: int, weighted: bool) -> KeyedJaggedTensor:
    """Bags of up to ``most`` ids, many of them empty, many ids twice."""
    lengths = torch.randint(0, most + 1, (len(KEYS) * size,))
    rows = [rows for rows, _, names in TABLES.values() for _ in names]
    parts = [torch.randint(0, rows[i], (int(n),)) for i, n in enumerate(lengths.view(len(KEYS), size).sum(1))]
    values = torch.cat(parts)
    return KeyedJaggedTensor(KEYS, values, torch.rand(values.numel()) if weighted else None, lengths=lengths)


def differences(
    rank: int, world: int, cases: list[tuple[PoolingType, bool, int, int]]
) -> list[tuple[float, float, float]]:
    """Largest differences of outputs, weights and optimizer state over five steps, by case."""
    torch.manual_seed(0)
    return [_difference(*case) for case in cases]


def _difference(pooling: PoolingType, weighted: bool, size: int, most: int) -> tuple[float, float, float]:
    make: dict[str, Any] = {"pg": dist.group.WORLD, "device": CPU, "sharding_type": None, "env": None}
    ours = CpuRowWiseAdagradBags(group(pooling, weighted), **make)
    stock = BatchedFusedEmbeddingBag(group(pooling, weighted), **make)
    for mine, theirs in zip(ours.split_embedding_weights(), stock.split_embedding_weights(), strict=True):
        mine.copy_(theirs)
    outputs = [_train(ours, stock, ids(size, most, weighted)) for _ in range(5)]
    return (
        max(outputs),
        _gap(ours.split_embedding_weights(), stock.split_embedding_weights()),
        _gap(
            [state for (state,) in ours.emb_module.split_optimizer_states()],
            [state for (state,) in stock.emb_module.split_optimizer_states()],
        ),
    )


def _train(ours: Any, stock: Any, features: KeyedJaggedTensor) -> float:
    mine, theirs = ours(features), stock(features)
    assert mine.shape == theirs.shape
    slope = torch.randn_like(theirs)
    (mine * slope).sum().backward()
    (theirs * slope).sum().backward()
    return _gap([mine], [theirs])


def _gap(left: list[Tensor], right: list[Tensor]) -> float:
    return max((float((a - b).abs().max()) if a.numel() else 0.0) for a, b in zip(left, right, strict=True))


CASES = [
    (PoolingType.SUM, False, 6, 1),
    (PoolingType.SUM, False, 6, 4),
    (PoolingType.SUM, True, 6, 4),
    (PoolingType.MEAN, False, 6, 1),
    (PoolingType.MEAN, False, 6, 4),
    (PoolingType.MEAN, False, 0, 4),
    (PoolingType.SUM, False, 6, 0),
]


def test_it_gives_the_outputs_rows_and_state_of_the_stock_kernel() -> None:
    (found,) = run_ranks(1, differences, CASES, timeout_s=60)
    assert max(max(gaps) for gaps in found) < 1e-6


def kernels(rank: int, world: int, optimizers: list[str]) -> list[bool]:
    lookups = [BagLookup([group(PoolingType.SUM, False, name)], device=CPU, pg=dist.group.WORLD) for name in optimizers]
    return [isinstance(lookup._emb_modules[0], CpuRowWiseAdagradBags) for lookup in lookups]


def test_only_row_wise_adagrad_takes_it() -> None:
    (found,) = run_ranks(1, kernels, ["rowwise_adagrad", "adagrad", "sgd"], timeout_s=60)
    assert found == [True, False, False]
