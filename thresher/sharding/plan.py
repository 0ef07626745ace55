"""A sharding plan as data: which rank holds which rows and columns of each table. Printed, saved, pinned."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from thresher.errors import PlanError
from thresher.settings import Settings

ShardingType = Literal[
    "auto",
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]


class WireConfig(Settings):
    """Precision of what ranks send each other.

    Attributes:
        forward: of vectors looked up; ``int8`` is fp16 where a table's rows are cut (sums cannot be added up in int8).
        backward: of their gradients.
        gradient_scale: gradients in fp16 travel multiplied by this, so that small ones do not vanish; larger ones than
            65504 / ``gradient_scale`` stop the run. A power of two.
    """

    forward: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    backward: Literal["fp32", "fp16", "bf16"] = "fp32"
    gradient_scale: float = Field(default=1024.0, gt=0)


class ShardingConfig(Settings):
    """Which rank holds which part of each table.

    Attributes:
        default: sharding type of tables not named in ``tables``; ``auto`` lets the planner choose.
        tables: sharding type by table name.
        plan: a plan file saved by an earlier run, used as it is; empty to plan anew.
        memory_gb: memory per rank that tables may use; 0 for what the machine has.
        measure_rows: training rows whose ids are counted before planning, so that often read tables and rows are
            spread over the ranks; 0 plans without.
        wire: precision of the vectors and gradients that ranks exchange.
    """

    default: ShardingType = "auto"
    tables: dict[str, ShardingType] = Field(default_factory=dict)
    plan: str = ""
    memory_gb: float = Field(default=0.0, ge=0)
    measure_rows: int = Field(default=0, ge=0)
    wire: WireConfig = WireConfig()


class Shard(Settings):
    """A rectangle of one table on one rank; ``bytes`` counts weights and optimizer state, as expected under tiers."""

    rank: int = Field(ge=0)
    row0: int = Field(ge=0)
    rows: int = Field(ge=0)
    col0: int = Field(ge=0)
    cols: int = Field(ge=0)
    bytes: int = Field(ge=0)


class TablePlan(Settings):
    """One table of one module (``module`` is its path in the model) and its shards.

    ``data_parallel`` has one shard of the whole table on each rank. ``kernel`` says who updates its rows: ``fused``
    in the backward, ``dense`` from gradients averaged over the ranks.

    Attributes:
        tiers: precisions that its rows can have, lowest first; none where all rows are fp32.
        lookups, head: measured lookups a sample, and the share of them that the most frequent 1 % of the rows get; 0
            where nothing was measured.
    """

    module: str
    table: str
    rows: int = Field(ge=1)
    dim: int = Field(ge=1)
    sharding_type: ShardingType
    kernel: Literal["dense", "fused"]
    shards: tuple[Shard, ...]
    tiers: tuple[str, ...] = ()
    lookups: float = Field(default=0.0, ge=0)
    head: float = Field(default=0.0, ge=0)

    @property
    def path(self) -> str:
        """The table's name within the model, ``module.table``."""
        return f"{self.module}.{self.table}" if self.module else self.table

    @property
    def splits_columns(self) -> bool:
        """Whether a row lies in more than one shard."""
        return any(shard.cols != self.dim for shard in self.shards)


class Plan(Settings):
    """The placement of all tables of a model on ``world`` ranks, ``local_world`` of them on each machine.

    Attributes:
        notes: what a reader of the results must know about this placement, one sentence each.
    """

    world: int = Field(ge=1)
    local_world: int = Field(ge=1)
    tables: tuple[TablePlan, ...]
    notes: tuple[str, ...] = ()

    def bytes_of(self, rank: int) -> int:
        """Bytes that rank's shards hold."""
        return sum(shard.bytes for table in self.tables for shard in table.shards if shard.rank == rank)

    def save(self, path: Path) -> None:
        """Writes the plan as JSON; a kill leaves the old file or the new one."""
        partial = path.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads a saved plan.

        Raises:
            PlanError: no such file, or it holds no plan.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            problem = error.strerror or str(error)
            raise PlanError(
                f"cannot be read: {problem}", where=str(path), fix="give a plan.json saved by a run"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise PlanError(
                f"holds no sharding plan: {place}: {first['msg']}",
                where=str(path),
                fix="give a plan.json saved by a run, or leave sharding.plan empty to plan anew",
            ) from None
