"""What a checkpoint holds of a sharded model and of the optimizers of its tables."""

from collections.abc import Mapping
from typing import Any

from thresher.errors import CheckpointError
from thresher.sharding.model import ShardedModel, weight_key
from thresher.sharding.plan import TablePlan
from thresher.sharding.tier_state import ModelState, TableShape

_TIERS = "tiers"


def model_state(sharded: ShardedModel) -> ModelState:
    """The weights of ``sharded``: tensors, and blocks of tables with tiers with their optimizer state."""
    tables = [] if sharded.held is None else sharded.held.tiered()
    shapes = {table.path: _shape(sharded, table) for table in sharded.plan.tables}
    return ModelState(sharded.wrapped, tables, shapes)


def _shape(sharded: ShardedModel, table: TablePlan) -> TableShape:
    assert sharded.held is not None, "a model with tables holds some"
    engine = sharded.held.engine
    columns = tuple(sorted({(shard.col0, shard.cols) for shard in table.shards}))
    return TableShape(
        weight=weight_key(sharded.wrapped, table),
        rows=table.rows,
        dim=table.dim,
        columns=columns,
        separate=len(columns) > 1 and engine.optimizer.column_state == "separate",
        tiered=table.sharding_type != "data_parallel" and engine.is_tiered(table.path),
    )


class TableState:
    """The optimizers of flat and replicated tables, and how far the choice of tiers has come."""

    def __init__(self, sharded: ShardedModel) -> None:
        self._sharded = sharded
        self._tiers: Any = None

    def state_dict(self) -> dict[str, Any]:
        """State by name of the table's weight."""
        state: dict[str, Any] = self._sharded.table_optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over state of the same structure, and the choice of tiers."""
        self._sharded.table_optimizer.load_state_dict(state_dict)
        if self._sharded.tiers is not None:
            self._sharded.tiers.load_state_dict(self._tiers)

    def facts(self) -> dict[str, Any]:
        """Of the choice of tiers, where there are any."""
        return {} if self._sharded.tiers is None else {_TIERS: self._sharded.tiers.state_dict()}

    def prepare(self, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """What is read into.

        Raises:
            CheckpointError: it was saved with tiers and this run has none, or the reverse.
        """
        self._tiers = facts.get(_TIERS)
        if (self._tiers is None) != (self._sharded.tiers is None):
            had, has = ("out", "") if self._tiers is None else ("", "out")
            raise CheckpointError(
                f"was saved with{had} tiers, this run is with{has} them",
                where="tiers.budget",
                fix="go on with the tiers it was saved with, or load its weights alone",
            )
        return self.state_dict()
