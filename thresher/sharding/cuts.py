"""How each sharding type cuts a table, and which types a table can have on given ranks.

data_parallel   table_wise   column_wise   row_wise   table_row_wise      table_column_wise   grid_shard
                                                      (one machine)       (one machine)       (both)
  0   1          0            0 1 2 3       0000       00 01 in rows       0 1 columns         cols over machines,
 [ ] [ ]        [ ]          [| | | ]       1111       of one machine      of one machine      rows within each
"""

from collections.abc import Mapping

import torch
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

from thresher.embeddings.tables import TableInfo

BAG_TYPES = (
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)
SEQUENCE_TYPES = ("table_wise", "column_wise", "row_wise")
ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")
COLUMN_TYPES = ("column_wise", "table_column_wise", "grid_shard")
COLUMN_STEP = 4
"""Columns of a shard come in multiples of this: FBGEMM's kernels work on vectors of four floats."""


def refusals(table: TableInfo, world: int, local_world: int) -> Mapping[str, str]:
    """Why ``table`` cannot have a sharding type, by type; types that fit are absent."""
    reasons = {kind: _refusal(table, kind, world, local_world) for kind in BAG_TYPES}
    return {kind: reason for kind, reason in reasons.items() if reason}


def _refusal(table: TableInfo, kind: str, world: int, local_world: int) -> str:
    if not table.pooled and kind not in SEQUENCE_TYPES:
        return _sequence_refusal(kind)
    if kind != "data_parallel" and table.dim % COLUMN_STEP:
        return f"its {table.dim} columns are no multiple of {COLUMN_STEP}, as FBGEMM's fused kernels need them"
    row_parts = {"row_wise": world, "table_row_wise": local_world, "grid_shard": local_world}.get(kind, 1)
    if not all(rows for rows in row_cuts(table.rows, row_parts)):
        return f"its {table.rows} rows leave some of {row_parts} ranks without a row"
    parts = column_parts(kind, world, local_world)
    if parts > 1 and column_width(table.dim, parts) == table.dim:
        return f"its {table.dim} columns cannot be cut into equal parts of a multiple of {COLUMN_STEP}"
    return ""


def _sequence_refusal(kind: str) -> str:
    if kind == "data_parallel":
        return "TorchRec's data-parallel EmbeddingCollection does not train on CPU"
    return "TorchRec has it for pooled tables (EmbeddingBagCollection) only"


def row_cuts(rows: int, parts: int) -> list[int]:
    """Rows of each of ``parts`` shards: ceil(rows / parts) each while they last, as TorchRec's id routing assumes."""
    step = -(-rows // parts)
    return [max(0, min(step, rows - part * step)) for part in range(parts)]


def column_parts(kind: str, world: int, local_world: int) -> int:
    """Into how many column shards a type aims to cut a table."""
    return {"column_wise": world, "table_column_wise": local_world, "grid_shard": world // local_world}.get(kind, 1)


def column_width(dim: int, parts: int) -> int:
    """The smallest width >= dim / parts that divides ``dim`` and is a multiple of 4; ``dim`` where there is none."""
    widths = [w for w in range(COLUMN_STEP, dim, COLUMN_STEP) if dim % w == 0 and w * parts >= dim]
    return min(widths, default=dim)


def rectangles(rows: int, dim: int, kind: str, world: int, local_world: int, width: int) -> list[tuple[int, ...]]:
    """(row0, rows, col0, cols) of the shards TorchRec gives a [rows, dim] table, column shards ``width`` wide."""
    sizes, offsets = calculate_shard_sizes_and_offsets(
        torch.empty(rows, dim, device="meta"), world, local_world, kind, col_wise_shard_dim=width
    )
    return [(row0, n, col0, cols) for (n, cols), (row0, col0) in zip(sizes, offsets, strict=True)]
