"""Tables with tiers for tests of their state: trained by the reference, in rectangles of one whole table."""

import torch
from torch import Tensor

from thresher.embeddings.group import TableGroup
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

PATH = "bags.item"
LEVELS = (Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32)
Rectangle = tuple[int, int, int, int]
"""First row, rows, first column, columns."""


def table(place: Rectangle, dim: int, optimizer: TableOptimizer, seed: int = 3) -> TieredTable:
    """An untouched rectangle of table ``bags.item``."""
    row0, rows, col0, cols = place
    return TieredTable(
        "item",
        PATH,
        rows,
        cols,
        seed=seed,
        init_scale=0.1,
        scalar=optimizer.has_scalar,
        vectors=optimizer.vectors,
        levels=LEVELS,
        row0=row0,
        col0=col0,
        full_dim=dim,
    )


def step(tables: list[TieredTable], optimizer: TableOptimizer, ids: Tensor, grad: Tensor) -> None:
    """Updates rows ``ids`` [n] of the whole table by ``grad`` [n, dim], wherever they lie."""
    for part in tables:
        part.decay = 0.1
        mine = (ids >= part.row0) & (ids < part.row0 + part.rows)
        group = TableGroup([part], [0], Pooling.SUM, optimizer, Reference())
        if optimizer.has_scalar and part.dim < part.full_dim:
            whole = grad[mine]
            order = torch.unique(ids[mine], return_inverse=True)[1]
            sums = torch.zeros(int(order.max()) + 1, grad.shape[1]).index_add_(0, order, whole).square().sum(1)
            group.exchange = lambda _, total=sums: [total]  # type: ignore[misc]
        bags = torch.arange(int(mine.sum()) + 1)
        out = group(ids[mine] - part.row0, bags)
        out.backward(grad[mine][:, part.col0 : part.col0 + part.dim])


def mixed(tables: list[TieredTable], optimizer: TableOptimizer, seed: int = 0) -> None:
    """Some steps on a third of the rows, with rows going up and down in between, so that all tiers occur."""
    dim, total = tables[0].full_dim, max(part.row0 + part.rows for part in tables)
    draw = torch.Generator().manual_seed(seed)
    for number in range(4):
        ids = torch.randint(0, total // 3, (40,), generator=draw) ** 2 // (total // 3) * 2
        step(tables, optimizer, ids, torch.randn(40, dim, generator=draw))
        for part in tables:
            edges = [0.0, 0.0, 0.0, 0.15, 0.25, 0.4]
            part.promote_above, part.keep_from = edges, [0.0, 0.0, 0.05, 0.1, 0.2, 0.3]
            if number == 2:
                gained = [edge * part.gain for edge in part.keep_from]
                Reference().demote(part, 0, part.rows, gained)


def same(left: TieredTable, right: TieredTable) -> bool:
    """Whether two tables of one shape hold the same, whatever slots hold it."""
    from thresher.sharding.tier_blocks import encoded, take_block

    one, two = (encoded(take_block(part, part.row0, part.rows), part.row0) for part in (left, right))
    rows = torch.arange(left.rows)
    return torch.equal(one, two) and torch.equal(Reference().read(left, rows), Reference().read(right, rows))
