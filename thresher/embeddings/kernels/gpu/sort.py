"""The distinct rows of a lookup and where they occur, found by one stable sort over all tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embeddings.kernels.backend import Table
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.checks import check_bags, check_form, lowest_id
from thresher.embeddings.kernels.gpu.layout import Layout, layout_of
from thresher.embeddings.kernels.gpu.places import Places, places_of


@dataclass(frozen=True)
class Runs:
    """Distinct rows of all tables, in ascending order of (table, row), each with its run of occurrences.

    Attributes:
        layout, places: of the tables and the lookup.
        bounds: where the rows of each table start, one more at the end; ``bounds_at`` the same on the device, int64.
        table: [U] int32.
        row: [U] int64.
        starts: [U + 1] int64: row u has the occurrences ``starts[u]`` .. ``starts[u + 1] - 1``.
        bag: [m] int64, by occurrence.
        source: [m] int64, by occurrence, where in the output's gradient its vector starts.
        factor: [m] fp32, by occurrence, what that vector is multiplied by; None for ones.
        long: rows whose runs are cut, None if there are none.
    """

    layout: Layout
    places: Places
    bounds: tuple[int, ...]
    bounds_at: Tensor
    table: Tensor
    row: Tensor
    starts: Tensor
    bag: Tensor
    source: Tensor
    factor: Tensor | None
    long: "Cut | None"

    def per_table(self, values: Tensor) -> list[Tensor]:
        """Values [U] by table."""
        return [values[start:end] for start, end in zip(self.bounds, self.bounds[1:], strict=False)]


@dataclass(frozen=True)
class Cut:
    """Runs longer than ``piece``, cut into pieces of that length from their start.

    Attributes:
        first_piece: [U] int64, the first piece of each row; -1 for rows whose run is whole.
        table: [P] int32, by piece.
        starts, ends: [P] int64, its occurrences.
    """

    piece: int
    first_piece: Tensor
    table: Tensor
    starts: Tensor
    ends: Tensor


def looked_up(tables: Sequence[Table], bags: Bags, tile: int) -> tuple[Layout, Places]:
    """Checked ids and offsets, as kernels walk over them.

    Raises:
        BadIds: an id is no row, or an offset out of order.
    """
    check_form(bags)
    if bags.ids.numel() and not bags.first_bags[-1]:
        check_bags(tables, bags)
    places = places_of(tables, bags)
    if bool(_is_bad(tables, bags, places)):
        check_bags(tables, bags)
    return layout_of(tables, tile), places


def sorted_runs(tables: Sequence[Table], bags: Bags, piece: int, tile: int) -> Runs:
    """The runs of a lookup; those longer than ``piece`` are cut. ``tile`` as in :func:`layout_of`.

    Raises:
        BadIds: an id is no row, or an offset out of order.
    """
    layout, places = looked_up(tables, bags, tile)
    device, ids = bags.ids.device, bags.ids.to(torch.int64)
    firsts = [0]
    for table in tables:
        firsts.append(firsts[-1] + table.rows)
    first_rows = torch.tensor(firsts, device=device)
    keys = torch.where(ids < 0, firsts[-1], ids + first_rows[places.table[places.bag]])
    if firsts[-1] < 1 << 31:
        keys = keys.to(torch.int32)  # half the passes of the sort
    keys, order = torch.sort(keys, stable=True)
    begins = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=begins[1:])
    starts = begins.nonzero()[:, 0]
    found = keys[starts].to(torch.int64)
    bounds_at = torch.searchsorted(found, first_rows)
    bounds = tuple(bounds_at.tolist())
    present = torch.cat([starts, starts.new_tensor([len(keys)])])[: bounds[-1] + 1]
    found = found[: bounds[-1]]
    owner = torch.searchsorted(first_rows, found, right=True) - 1
    bag = places.bag[order]
    return Runs(
        layout=layout,
        places=places,
        bounds=bounds,
        bounds_at=bounds_at,
        table=owner.to(torch.int32),
        row=found - first_rows[owner],
        starts=present,
        bag=bag,
        source=places.output[bag],
        factor=_factor(bags, places, order, bag),
        long=_cut(owner.to(torch.int32), present, piece),
    )


def _factor(bags: Bags, places: Places, order: Tensor, bag: Tensor) -> Tensor | None:
    weights = None if bags.weights is None else bags.weights[order]
    if bags.pooling is not Pooling.MEAN:
        return weights
    inverse = 1.0 / (places.starts[bag + 1] - places.starts[bag]).to(torch.float32)
    return inverse if weights is None else weights * inverse


def _cut(table: Tensor, starts: Tensor, piece: int) -> Cut | None:
    lengths = starts[1:] - starts[:-1]
    long = (lengths > piece).nonzero()[:, 0]
    if not len(long):
        return None
    pieces = (lengths[long] + (piece - 1)) // piece
    first = pieces.cumsum(0) - pieces
    first_piece = torch.full_like(lengths, -1)
    first_piece[long] = first
    owner = torch.repeat_interleave(torch.arange(len(long), device=table.device), pieces)
    begins = starts[long][owner] + (torch.arange(len(owner), device=table.device) - first[owner]) * piece
    ends = torch.minimum(begins + piece, starts[long + 1][owner])
    return Cut(piece, first_piece, table[long][owner], begins, ends)


def _is_bad(tables: Sequence[Table], bags: Bags, places: Places) -> Tensor:
    """One flag on the device: whether any offset or id is wrong."""
    offsets, device = bags.offsets, bags.ids.device
    table = places.table[places.bag]
    lowest = torch.tensor([lowest_id(table) for table in tables], device=device)[table]
    rows = torch.tensor([table.rows for table in tables], device=device)[table]
    ids = ((bags.ids < lowest) | (bags.ids >= rows)).any()
    return ids | (offsets[0] != 0) | (offsets[-1] != bags.ids.numel()) | (offsets[1:] < offsets[:-1]).any()
