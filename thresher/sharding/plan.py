"""A sharding plan as data: which rank holds which rows and columns of each table. Printed, saved, pinned."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from thresher.settings import Settings


class Shard(Settings):
    """A rectangle of one table on one rank; ``bytes`` counts weights and optimizer state."""

    rank: int = Field(ge=0)
    row0: int = Field(ge=0)
    rows: int = Field(ge=0)
    col0: int = Field(ge=0)
    cols: int = Field(ge=0)
    bytes: int = Field(ge=0)


class TablePlan(Settings):
    """One table of one module (``module`` is its path in the model) and its shards."""

    module: str
    table: str
    rows: int = Field(ge=1)
    dim: int = Field(ge=1)
    sharding_type: str
    kernel: Literal["dense", "fused"]
    shards: tuple[Shard, ...]


class Plan(Settings):
    """The placement of all tables of a model on ``world`` ranks, ``local_world`` of them on each machine."""

    world: int = Field(ge=1)
    local_world: int = Field(ge=1)
    tables: tuple[TablePlan, ...]

    def bytes_of(self, rank: int) -> int:
        """Bytes that rank's shards hold."""
        return sum(shard.bytes for table in self.tables for shard in table.shards if shard.rank == rank)

    def save(self, path: Path) -> None:
        """Writes the plan as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
