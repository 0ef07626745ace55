"""Tables that are looked up together: one call forward, one call backward, which also updates them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from thresher.embeddings.dynamic.rows import DynamicRows
from thresher.embeddings.kernels.backend import Backend, Sorted, Table, UpdateStats
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.rules import UpdateRule
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.tiered import TieredTable
from thresher.errors import BadBatch

RowSumExchange = Callable[[list[Tensor]], list[Tensor]]
"""Adds up the sums of squares [U] of each table over its column shards. Collective."""


@dataclass
class StepContext:
    """What all groups of a model share during a step.

    Attributes:
        importance: [B] fp32 weight of each sample of the (global) batch in the priorities of rows; None for ones.
    """

    importance: Tensor | None = None


class TableGroup:
    """Tables that one call looks up, and whose rows the backward of that call updates.

    Args:
        features: for each feature, in the order of the ids, the number of the table it reads.
        dynamic: gives rows to the raw ids of those tables that have no others.
        exchange: needed where ``tables`` are column shards and the optimizer has exact row-wise state.

    Attributes:
        lr: learning rate of the next update.
        stats: of the last update.
        anchor: makes autograd call the backward; its gradient stays None.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        features: Sequence[int],
        pooling: Pooling,
        optimizer: TableOptimizer,
        backend: Backend,
        context: StepContext | None = None,
        exchange: RowSumExchange | None = None,
        dynamic: DynamicRows | None = None,
    ) -> None:
        self.tables, self.features, self.pooling = tuple(tables), tuple(features), pooling
        self.optimizer, self.backend, self.exchange = optimizer, backend, exchange
        self.context = context or StepContext()
        self.dynamic = dynamic
        self.lr = optimizer.lr
        self.stats = UpdateStats()
        self.anchor = torch.zeros(0, device=tables[0].device, requires_grad=True)

    def __call__(
        self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None, batch: Sequence[int] | None = None
    ) -> Tensor:
        """Vectors as :class:`Bags` describes; ``batch`` is given where features have different numbers of bags.

        Raises:
            BadIds: an id is no row of its table.
        """
        if batch is None:
            batch = [(offsets.numel() - 1) // len(self.features)] * len(self.features)
        bags = Bags(ids, offsets, weights, self.features, tuple(batch), self.pooling)
        training = torch.is_grad_enabled()
        if self.dynamic is not None:
            bags = self.dynamic.translate(bags, training)
        if not training:
            return self.backend.lookup(self.tables, bags)
        output: Tensor = _Lookup.apply(self.anchor, weights, self, bags)  # type: ignore[no-untyped-call]
        return output

    def update(self, found: Sorted, grad: Tensor) -> None:
        """Applies the gradient of an output to the rows it came from.

        Raises:
            BadBatch: importance is not of the samples that were looked up; nothing has been updated.
        """
        importance = self._importance(found.bags)
        for table in self.tables:
            table.advance()
        rules = [self._rule(table) for table in self.tables]
        sums = None
        if self.exchange is not None:
            sums = self.exchange(self.backend.row_sums(self.tables, found, grad, rules))
        self.stats = self.backend.update(self.tables, found, grad, rules, importance, sums)
        if self.dynamic is not None:
            self.dynamic.close()

    def _importance(self, bags: Bags) -> Tensor | None:
        """Of the bags' samples; None also where no row has a priority."""
        given = self.context.importance
        if given is None or not any(isinstance(table, TieredTable) for table in self.tables):
            return None
        for feature, (table, size) in enumerate(zip(bags.tables, bags.batch, strict=True)):
            if given.numel() != size:
                raise BadBatch(
                    f"importance is given for {given.numel()} samples, but feature {feature} has {size} bags",
                    where=f"table '{self.tables[table].name}'",
                    fix="give one number for each sample of the batch, and every feature one bag for each sample",
                )
        return given

    def _rule(self, table: Table) -> UpdateRule:
        if not isinstance(table, TieredTable):
            return self.optimizer.rule(self.lr, table.step)
        above = tuple(table.gain * threshold for threshold in table.promote_above)
        return self.optimizer.rule(self.lr, table.step, table.gain * table.decay, above)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weights: Tensor | None, group: TableGroup, bags: Bags) -> Tensor:
        ctx.group, ctx.found = group, group.backend.sort(group.tables, bags)
        return group.backend.lookup(group.tables, bags, ctx.found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        group, found = ctx.group, ctx.found
        grad = grad.contiguous()
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = group.backend.weight_gradient(group.tables, found.bags, grad)
        group.update(found, grad)
        return None, weight_grad, None, None
