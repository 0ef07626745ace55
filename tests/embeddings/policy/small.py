"""Small tables in training, for tests of the policy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from thresher.embeddings.group import StepContext, TableGroup
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.plan import TableTierPlan, TierPlan, tier_plan
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.embeddings.tables import TableInfo

BACKEND = Reference()
SGD = TableOptimizer(name="sgd", lr=0.1)


def info(name: str, rows: int, dim: int) -> TableInfo:
    return TableInfo("bags", name, rows, dim, True, (name,))


def planned(config: TierConfig, *infos: TableInfo, optimizer: TableOptimizer = SGD) -> TierPlan:
    return tier_plan(infos, config, optimizer)


def table(plan: TableTierPlan, files: Mapping[Tier, Path] | None = None, **cut: int) -> TieredTable:
    """A table of the plan, or the rectangle ``cut`` (row0, rows, col0, dim) of it."""
    rows, dim = cut.pop("rows", plan.rows), cut.pop("dim", plan.dim)
    return TieredTable(
        plan.table,
        plan.path,
        rows,
        dim,
        seed=3,
        init_scale=0.1,
        scalar=plan.scalar,
        vectors=plan.vectors,
        levels=plan.levels,
        entry=plan.entry,
        full_dim=plan.dim,
        files=files,
        **cut,
    )


def train(
    tables: Sequence[TieredTable],
    ids: Sequence[Tensor],
    grad: Sequence[Tensor],
    optimizer: TableOptimizer = SGD,
    importance: Tensor | None = None,
) -> TableGroup:
    """One update: bag b of table t is the id ``ids[t][b]``, its vector has the gradient ``grad[t][b]``."""
    numbers = list(range(len(tables)))
    group = TableGroup(tables, numbers, Pooling.SUM, optimizer, BACKEND, StepContext(importance))
    flat = torch.cat(list(ids))
    out = group(flat, torch.arange(len(flat) + 1), batch=[len(part) for part in ids])
    out.backward(torch.cat([part.flatten() for part in grad]).view_as(out) if len(tables) == 1 else _beside(out, grad))
    return group


def _beside(out: Tensor, grad: Sequence[Tensor]) -> Tensor:
    same = len({len(part) for part in grad}) == 1
    return torch.cat(list(grad), dim=1) if same else torch.cat([part.flatten() for part in grad]).view_as(out)


def values(table: TieredTable) -> Tensor:
    """[rows, dim] fp32: how the table reads."""
    return BACKEND.read(table, torch.arange(table.rows))


def zipf_ids(seed: int, count: int, rows: int, exponent: float = 1.1) -> Tensor:
    """[count] ids with P(i) ~ (i + 1)^-exponent."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-exponent)
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))


ALL_LEVELS = ("fp32", "fp16", "int8", "int4", "dropped")
STORED_LEVELS = (Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)
