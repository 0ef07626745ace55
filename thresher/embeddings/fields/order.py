"""How the columns of a collection's pooled output stand to those of the fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from thresher.embeddings.fields.field import Field, columns_by_key


@dataclass(frozen=True)
class Run:
    """Neighbouring keys of one width: ``count`` keys from key ``key0``, whose columns start at ``col0``."""

    key0: int
    count: int
    col0: int
    width: int


@dataclass(frozen=True)
class OutputOrder:
    """The keys of one pooled output [B, D], in its own order, which a sharded collection chooses.

    Attributes:
        keys: of the output.
        fields: [K] int64, the field of each key.
        columns: [D] int64, for each column of the output its place among the columns of all fields.
        runs: the keys by width.
        shared: whether a field has several keys.
    """

    keys: tuple[str, ...]
    fields: Tensor
    columns: Tensor
    runs: tuple[Run, ...]
    shared: bool

    @staticmethod
    def of(fields: Sequence[Field], module: str, keys: Sequence[str], device: torch.device) -> "OutputOrder":
        """The order of an output of collection ``module`` with ``keys``."""
        known = columns_by_key(fields, module)
        places = [known[key] for key in keys]
        columns = [column for _, first, width in places for column in range(first, first + width)]
        return OutputOrder(
            keys=tuple(keys),
            fields=torch.tensor([number for number, _, _ in places], dtype=torch.int64, device=device),
            columns=torch.tensor(columns, dtype=torch.int64, device=device),
            runs=_runs([width for _, _, width in places]),
            shared=len({number for number, _, _ in places}) < len(places),
        )


def _runs(widths: list[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    key = column = 0
    for width, same in groupby(widths):
        count = len(list(same))
        runs.append(Run(key, count, column, width))
        key, column = key + count, column + count * width
    return tuple(runs)
