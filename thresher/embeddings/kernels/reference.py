"""The contract of ``backend.py`` in plain torch: runs everywhere, slowly, and defines what the other backends do."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import HISTOGRAM_BASE, HISTOGRAM_BUCKETS, Sorted, Table, UpdateStats
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.checks import bad_gradient, check_bags, tier_full
from thresher.embeddings.kernels.records import Noise, free_count, free_slots, move_records, read_rows, store_rows
from thresher.embeddings.kernels.reference_rules import apply_rule, column_sums, l2_gradient
from thresher.embeddings.kernels.rules import UpdateRule
from thresher.embeddings.kernels.segments import (
    Occurrences,
    bag_numbers,
    coefficients,
    feature_bounds,
    feature_views,
    features_of,
    inverse_lengths,
    occurrences,
    segment_sums,
)
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.generator import DEMOTED, WEIGHTS
from thresher.embeddings.rows.tiered import FREE, HIGH, TieredTable
from thresher.embeddings.rows.tiers import Tier


class Reference:
    """See :class:`thresher.embeddings.kernels.backend.Backend`; on any device."""

    name = "reference"

    def sort(self, tables: Sequence[Table], bags: Bags) -> Sorted:
        """See the contract."""
        check_bags(tables, bags)
        found = tuple(occurrences(bags, number) for number in range(len(tables)))
        return Sorted(bags, tuple(each.rows for each in found), found)

    @torch.no_grad()
    def lookup(self, tables: Sequence[Table], bags: Bags, checked: Sorted | None = None) -> Tensor:
        """See the contract."""
        if checked is None:
            check_bags(tables, bags)
        dims = [tables[number].dim for number in bags.tables]
        output = _empty_output(bags, dims)
        bounds = feature_bounds(bags)
        for feature, view in enumerate(feature_views(output, bags, dims)):
            ids = slice(bounds[feature], bounds[feature + 1])
            values = self.read(tables[bags.tables[feature]], bags.ids[ids].to(torch.int64))
            if bags.weights is not None:
                values = values * bags.weights[ids].unsqueeze(1)
            view.copy_(values if bags.pooling is Pooling.NONE else _pooled(values, bags, feature))
        return output

    @torch.no_grad()
    def weight_gradient(self, tables: Sequence[Table], bags: Bags, grad: Tensor) -> Tensor:
        """See the contract."""
        result = torch.zeros(bags.ids.numel(), device=grad.device)
        dims = [tables[number].dim for number in bags.tables]
        bounds = feature_bounds(bags)
        for feature, view in enumerate(feature_views(grad, bags, dims)):
            ids = slice(bounds[feature], bounds[feature + 1])
            values = self.read(tables[bags.tables[feature]], bags.ids[ids].to(torch.int64))
            of_ids = view if bags.pooling is Pooling.NONE else view[bag_numbers(bags, feature)]
            result[ids] = column_sums(of_ids * values)
            if bags.pooling is Pooling.MEAN:
                result[ids] *= inverse_lengths(bags, feature)[bag_numbers(bags, feature)]
        return result

    @torch.no_grad()
    def row_sums(
        self, tables: Sequence[Table], found: Sorted, grad: Tensor, rules: Sequence[UpdateRule]
    ) -> list[Tensor]:
        """See the contract."""
        gradients = _row_gradients(tables, found, grad)
        sums = []
        for table, places, g, rule in zip(tables, found.handle, gradients, rules, strict=True):
            g = l2_gradient(rule, self.read(table, places.rows), g)
            sums.append(column_sums(g * g))
        return sums

    @torch.no_grad()
    def update(
        self,
        tables: Sequence[Table],
        found: Sorted,
        grad: Tensor,
        rules: Sequence[UpdateRule],
        importance: Tensor | None = None,
        row_sums: Sequence[Tensor] | None = None,
    ) -> UpdateStats:
        """See the contract; where a gradient is not finite, nothing is updated."""
        gradients = _row_gradients(tables, found, grad)
        stats = UpdateStats()
        for number, (table, rule) in enumerate(zip(tables, rules, strict=True)):
            change = _Change(found.handle[number], gradients[number], rule, row_sums[number] if row_sums else None)
            if isinstance(table, TieredTable):
                promoted, refused = _update_tiered(table, change, _increments(found, number, importance))
            else:
                promoted, refused = 0, 0
                _update_flat(table, change)
            rows = stats.rows + len(change.places.rows)
            stats = UpdateStats(rows, stats.promoted + promoted, stats.refused + refused)
        return stats

    def read(self, table: Table, rows: Tensor) -> Tensor:
        """See the contract; rows of -1 read zeros."""
        values = torch.zeros(len(rows), table.dim, device=table.device)
        there = (rows >= 0).nonzero()[:, 0]
        if isinstance(table, TieredTable):
            values[there] = read_rows(table, rows[there], with_state=False).x
        else:
            values[there] = table.weights[rows[there]]
        return values

    @torch.no_grad()
    def write(self, table: TieredTable, rows: Tensor, values: Tensor, tiers: Tensor) -> None:
        """See the contract.

        Raises:
            PlanError: a tier has too few slots.
        """
        found = read_rows(table, rows, with_state=False)
        moves = found.tier != tiers
        for level in table.stored_levels:
            free_slots(table, level, found.slot[moves & (found.tier == level)])
            _require_slots(table, level, int((moves & (tiers == level)).sum()))
        # What moves has given its slot back already: to the store it is a row without one.
        found.tier[moves], found.slot[moves] = int(Tier.NONE), 0
        found.scale.zero_()
        store_rows(table, found, tiers, values, [torch.zeros_like(values)] * table.n_vectors, None)

    def histogram(self, table: TieredTable) -> Tensor:
        """See the contract."""
        known = table.stat[:, 1][table.tier_of() != Tier.NONE]
        priority = known / torch.tensor(table.gain, dtype=torch.float32, device=table.device)
        bucket = (priority.view(torch.int32) >> 20) - HISTOGRAM_BASE
        return torch.bincount(bucket.clamp(0, HISTOGRAM_BUCKETS - 1), minlength=HISTOGRAM_BUCKETS)

    @torch.no_grad()
    def demote(self, table: TieredTable, first: int, count: int, keep_from: Sequence[float]) -> int:
        """See the contract."""
        rows = torch.arange(first, min(first + count, table.rows), device=table.device)
        tier = table.tier_of()[rows]
        target, priority = tier, table.stat[rows, 1]
        for level, lower in reversed(list(zip(table.levels[1:], table.levels, strict=False))):
            threshold = torch.tensor(keep_from[level], dtype=torch.float32, device=table.device)
            target = torch.where((target == level) & (priority < threshold), int(lower), target)
        moving = _with_slots(table, tier, target)[1] != tier
        found = read_rows(table, rows[moving], with_state=True)
        noise = Noise(table, found.rows, DEMOTED + WEIGHTS)
        store_rows(table, found, target[moving], found.x, found.vectors, noise)
        return int(moving.sum())

    def compact(self, table: TieredTable, tier: Tier) -> None:
        """See the contract."""
        rows = (table.tier_of() == tier).nonzero()[:, 0]
        move_records(table, tier, rows)
        table.count[tier, HIGH], table.count[tier, FREE] = len(rows), 0
        table.trim(tier)


@dataclass(frozen=True)
class _Change:
    """What an update does to the rows of one table."""

    places: Occurrences
    g: Tensor
    rule: UpdateRule
    sums: Tensor | None


def _empty_output(bags: Bags, dims: Sequence[int]) -> Tensor:
    if bags.pooling is Pooling.NONE:
        shape = [bags.ids.numel(), dims[0]]
    elif bags.is_uniform:
        shape = [bags.batch[0], sum(dims)]
    else:
        shape = [sum(size * dim for size, dim in zip(bags.batch, dims, strict=True))]
    return torch.zeros(shape, device=bags.ids.device)


def _pooled(values: Tensor, bags: Bags, feature: int) -> Tensor:
    first, last = bags.first_bags[feature], bags.first_bags[feature + 1]
    sums = segment_sums(values, bags.offsets[first + 1 : last + 1] - bags.offsets[first:last])
    return sums * inverse_lengths(bags, feature).unsqueeze(1) if bags.pooling is Pooling.MEAN else sums


def _row_gradients(tables: Sequence[Table], found: Sorted, grad: Tensor) -> list[Tensor]:
    """For each table [U, D], one row for each distinct row of the lookup."""
    bags = found.bags
    views = feature_views(grad, bags, [tables[number].dim for number in bags.tables])
    gradients = []
    for number, table in enumerate(tables):
        parts = [_of_ids(bags, feature, views[feature]) for feature in features_of(bags, number)]
        every = torch.cat([grad.new_zeros(0, table.dim), *parts])
        places = found.handle[number]
        g = segment_sums(every[places.order], places.counts)
        _require_finite(table, places.rows, g)
        gradients.append(g)
    return gradients


def _of_ids(bags: Bags, feature: int, view: Tensor) -> Tensor:
    """[ids of the feature, D] gradients of the rows, one for each id."""
    of_ids = view if bags.pooling is Pooling.NONE else view[bag_numbers(bags, feature)]
    factor = coefficients(bags, feature)
    return of_ids if factor is None else of_ids * factor.unsqueeze(1)


def _require_finite(table: Table, rows: Tensor, g: Tensor) -> None:
    finite = g.isfinite().all(1)
    if not bool(finite.all()):
        row = int(rows[int((~finite).to(torch.int8).argmax())])
        raise bad_gradient(table, row)


def _increments(found: Sorted, number: int, importance: Tensor | None) -> Tensor:
    """[U] fp32: what each row's priority grows by, before the gain."""
    places = found.handle[number]
    if importance is None:
        return torch.as_tensor(places.counts, dtype=torch.float32)
    samples = [bag_numbers(found.bags, feature) for feature in features_of(found.bags, number)]
    every = torch.cat([places.order[:0], *samples])[places.order]
    sums = segment_sums(importance[every].unsqueeze(1), places.counts)
    return sums[:, 0]


def _update_flat(table: FlatTable, change: _Change) -> None:
    rows = change.places.rows
    scalar = table.scalar[rows] if table.scalar.numel() else table.scalar
    vectors = [vector[rows] for vector in table.vectors]
    x, scalar, vectors = apply_rule(
        change.rule, table.weights[rows], change.g, scalar, vectors, table.full_dim, change.sums
    )
    table.weights[rows] = x
    if table.scalar.numel():
        table.scalar[rows] = scalar
    for kept, vector in zip(table.vectors, vectors, strict=True):
        kept[rows] = vector


def _update_tiered(table: TieredTable, change: _Change, increments: Tensor) -> tuple[int, int]:
    """(promoted, refused)."""
    rule, found = change.rule, read_rows(table, change.places.rows, with_state=True)
    stat = table.stat[found.rows]
    x, scalar, vectors = apply_rule(rule, found.x, change.g, stat[:, 0], found.vectors, table.full_dim, change.sums)
    gain = torch.tensor(rule.priority_gain, dtype=torch.float32, device=table.device)
    priority = stat[:, 1] + gain * increments
    tier = torch.where(found.tier == Tier.NONE, int(table.entry), found.tier)
    wanted = tier
    for level in table.levels:
        above = torch.tensor(rule.promote_above[level], dtype=torch.float32, device=table.device)
        wanted = torch.where((priority > above) & (tier < level), int(level), wanted)
    refused, target = _with_slots(table, found.tier, wanted, tier)
    store_rows(table, found, target, x, vectors, Noise(table, found.rows, WEIGHTS))
    table.stat[found.rows] = torch.stack([scalar, priority], dim=1)
    promoted = int(((target > tier) & (found.tier != Tier.NONE)).sum())
    return promoted, refused


def _with_slots(
    table: TieredTable, tier: Tensor, wanted: Tensor, otherwise: Tensor | None = None
) -> tuple[int, Tensor]:
    """How many rows cannot have their tier, and the tier of each: ``wanted``, or ``otherwise`` (``tier``) for those.

    Slots that rows leave in the same pass count as taken until its end.
    """
    target, refused = wanted.clone(), 0
    for level in table.stored_levels:
        arrivals = ((wanted == level) & (tier != level)).nonzero()[:, 0]
        late = arrivals[free_count(table, level) :]
        target[late] = (tier if otherwise is None else otherwise)[late]
        refused += len(late)
    return refused, target


def _require_slots(table: TieredTable, tier: Tier, number: int) -> None:
    if number > free_count(table, tier):
        raise tier_full(table, tier, number, free_count(table, tier))
