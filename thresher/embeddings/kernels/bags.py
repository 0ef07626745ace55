"""What is looked up: the ids of several features in bags, and where each bag's vector goes."""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from torch import Tensor


class Pooling(Enum):
    """What a bag yields: the (weighted) sum or mean of its rows, or each row by itself."""

    SUM = "sum"
    MEAN = "mean"
    NONE = "none"


@dataclass(frozen=True)
class Bags:
    """The ids of one lookup, feature after feature, bag after bag; TorchRec's order.

        features   a a a        b b b            tables = (0, 1), batch = (3, 3)
        ids        [7 7 9] [ ] [4]   [1] [2] [3]
        offsets    0     3   3   4   5   6   7

    Attributes:
        ids: [n] int32 or int64 row numbers within the tables (shards) given to the lookup. -1 is allowed for tables
            with ``identity`` only: an id without a row, which reads zeros and is not updated.
        offsets: [sum(batch) + 1] int64.
        weights: [n] fp32, or None for ones.
        tables: which table each feature reads. A table may be read by several features.
        batch: bags of each feature. Where all are equal, pooled output is [B, sum of widths], a feature's columns
            beside the next one's; else it is flat, one feature's [batch, width] after the other's.
        pooling: with ``NONE`` the output is [n, width], and all tables are of one width.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    tables: tuple[int, ...]
    batch: tuple[int, ...]
    pooling: Pooling

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all features have the same number of bags."""
        return len(set(self.batch)) <= 1

    @cached_property
    def first_bags(self) -> tuple[int, ...]:
        """For each feature the number of its first bag; one more at the end."""
        firsts = [0]
        for size in self.batch:
            firsts.append(firsts[-1] + size)
        return tuple(firsts)
