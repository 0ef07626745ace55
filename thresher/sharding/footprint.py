"""Bytes of tables and shards: what a rank's memory has to hold, with tiers and without."""

from dataclasses import dataclass

from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.plan import TierPlan
from thresher.embeddings.tables import FLOAT_BYTES
from thresher.sharding.plan import Plan, TablePlan


@dataclass(frozen=True)
class Footprint:
    """Sizes of shards in memory, optimizer state included.

    Attributes:
        tiers: of the tables that are cut or placed; None where no table has tiers.
    """

    optimizer: TableOptimizer
    tiers: TierPlan | None = None

    def shard_bytes(self, path: str, rows: int, cols: int) -> int:
        """Bytes of a [rows, cols] shard of the table ``path``.

        Of a table with tiers these are the bytes to expect: its part of the budget, headers included, and never less
        than all rows take in its lowest tier.
        """
        if self.tiers is not None and self.levels(path):
            return self.tiers.planned_bytes(path, rows, cols)
        return rows * cols * FLOAT_BYTES + self.optimizer.state_bytes(rows, cols)

    def levels(self, path: str) -> tuple[str, ...]:
        """Names of a table's tiers, lowest first; none for a table that stays fp32."""
        table = self.tiers.by_path.get(path) if self.tiers is not None else None
        if table is None or not table.tiered:
            return ()
        return tuple(tier.name.lower() for tier in table.levels)

    def priced(self, plan: Plan) -> Plan:
        """The same plan with the bytes and tiers of its tables."""
        return plan.model_copy(update={"tables": tuple(self._priced(table) for table in plan.tables)})

    def _priced(self, table: TablePlan) -> TablePlan:
        sizes = [self.shard_bytes(table.path, shard.rows, shard.cols) for shard in table.shards]
        shards = [s.model_copy(update={"bytes": size}) for s, size in zip(table.shards, sizes, strict=True)]
        return table.model_copy(update={"shards": tuple(shards), "tiers": self.levels(table.path)})
