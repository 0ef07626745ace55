"""Ids and offsets that are no rows and no bags stop a step before anything reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.kernels.bags import Bags
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import BadGradient, BadIds, PlanError

_WHOLE = (torch.int32, torch.int64)


def check_bags(tables: Sequence[Table], bags: Bags) -> None:
    """Returns if every id is a row of its table and the offsets are in order.

    Raises:
        BadIds: names the first fault: of types and lengths, then of offsets, then of ids.
    """
    check_form(bags)
    _check_offsets(tables, bags)
    bounds = bags.offsets[list(bags.first_bags)].tolist()
    for feature, number in enumerate(bags.tables):
        table = tables[number]
        lowest = lowest_id(table)
        ids = bags.ids[bounds[feature] : bounds[feature + 1]]
        bad = (ids < lowest) | (ids >= table.rows)
        if bool(bad.any()):
            raise bad_id(tables, bags, bounds[feature] + int(bad.to(torch.int8).argmax()), feature)


def check_form(bags: Bags) -> None:
    """Returns if types and lengths fit; looks at no id and no offset.

    Raises:
        BadIds: they do not.
    """
    for name, tensor, types in (("ids", bags.ids, _WHOLE), ("offsets", bags.offsets, (torch.int64,))):
        if tensor.dtype not in types or tensor.dim() != 1:
            raise BadIds(
                f"{name} are a {tensor.dim()}-dimensional tensor of {_name(tensor.dtype)}",
                fix=f"give one dimension of {' or '.join(_name(kind) for kind in types)}",
            )
    if len(bags.tables) != len(bags.batch):
        raise BadIds(f"{len(bags.tables)} features have {len(bags.batch)} batch sizes", fix="give one for each feature")
    weights = bags.weights
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != bags.ids.shape):
        raise BadIds(
            f"{_numbers(weights)} weights of {_name(weights.dtype)} came with {bags.ids.numel()} ids",
            fix="give one float32 weight for each id",
        )
    wanted = bags.first_bags[-1] + 1
    if bags.offsets.numel() != wanted:
        raise BadIds(
            f"{bags.offsets.numel()} offsets came with {wanted - 1} bags",
            fix=f"give {wanted} offsets: where each bag starts, and the number of ids",
        )


def lowest_id(table: Table) -> int:
    """The lowest id a table takes: -1, an id without a row, where rows are known by other ids."""
    return -1 if isinstance(table, TieredTable) and table.identity is not None else 0


def bad_id(tables: Sequence[Table], bags: Bags, position: int, feature: int) -> BadIds:
    """The error about the id at ``position`` of ``bags.ids``."""
    table = tables[bags.tables[feature]]
    return BadIds(
        f"id {int(bags.ids[position])} at position {position} is outside {lowest_id(table)}..{table.rows - 1}",
        where=_place(tables, bags, feature),
        fix="map ids to rows before the lookup, or give the table more rows",
    )


def bad_gradient(table: Table, row: int) -> BadGradient:
    """The error about the gradient of a row of ``table``."""
    return BadGradient(
        f"the gradient of row {row} is not finite",
        where=f"table '{table.name}'",
        fix="lower the learning rate, clip gradients, or look for values that are not finite in the batch",
    )


def tier_full(table: TieredTable, tier: Tier, wanted: int, free: int) -> PlanError:
    """The error about rows that do not all find a slot in ``tier``."""
    return PlanError(
        f"{wanted} rows need a slot in tier {tier.name.lower()}, {free} are free",
        where=f"table '{table.name}'",
        fix="give the tier more slots",
    )


def _check_offsets(tables: Sequence[Table], bags: Bags) -> None:
    offsets = bags.offsets
    if int(offsets[0]) != 0:
        raise BadIds(f"the first offset is {int(offsets[0])}", fix="start with 0")
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        bag = int(falls.to(torch.int8).argmax())
        feature = next(f for f, first in enumerate(bags.first_bags[1:]) if bag < first)
        raise BadIds(
            f"offset {int(offsets[bag + 1])} of bag {bag + 1} follows offset {int(offsets[bag])} of bag {bag}",
            where=_place(tables, bags, feature),
            fix="give offsets that never decrease",
        )
    if int(offsets[-1]) != bags.ids.numel():
        raise BadIds(
            f"the last offset is {int(offsets[-1])}, there are {bags.ids.numel()} ids",
            fix="end with the number of ids",
        )


def _place(tables: Sequence[Table], bags: Bags, feature: int) -> str:
    return f"feature {feature} of table '{tables[bags.tables[feature]].name}'"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "0-dimensional"
