"""What a user says about tiers: a budget, and what may not be touched."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from thresher.settings import Settings

Level = Literal["fp32", "fp16", "int8", "int4", "dropped"]
LEVELS: tuple[Level, ...] = ("fp32", "fp16", "int8")


class TableTiers(Settings):
    """What differs for one table.

    Attributes:
        levels: its tiers; ``[fp32]`` keeps the table as it would be without tiers.
    """

    levels: Annotated[tuple[Level, ...], Field(min_length=1)] = LEVELS


class TierStorage(Settings):
    """Tables larger than memory: records of the tiers in ``tiers`` live in files, mapped into memory.

    Attributes:
        folder: where the files go, one a shard and tier; empty for memory.
        tiers: the tiers that go there.
        ram_gb: how much of them a rank may keep in memory.
    """

    folder: Path = Path()
    tiers: tuple[Level, ...] = ("int8", "int4", "fp16")
    ram_gb: float = Field(default=2.0, gt=0)


class TierConfig(Settings):
    """F-Quantization (SHARK, arXiv 2308.09395): the precision of each row, chosen by its priority under a budget.

    A row's priority is a decaying sum over its occurrences, p <- (1 - decay) p + decay (positive_weight c+ + c-), with
    c+ and c- its occurrences in positive and negative samples of a step. Constants are not published: these are ours.
    On ids of a zipf distribution (1.05, batches of 4,096, 40%) a spread of 4 gives 5% of the rows fp32 and 15% fp16,
    and a decay of 0.001 moves a twentieth of the rows that 0.01 moves, of which most would soon move back.

    Attributes:
        budget: bytes that tables may take, headers and optimizer state included: a share of their fp32 size with
            state (``40%``), or bytes (``2GB``); empty for no tiers at all.
        levels: tiers in use.
        positive_weight: weight of an occurrence in a sample with a positive label (alpha).
        decay: share of its priority that a row loses each step (beta).
        spread: threshold of a tier over that of the next lower one.
        hysteresis: a row moves up above (1 + hysteresis) x threshold, and down below (1 - hysteresis) x.
        rebalance_every: steps between two choices of thresholds; at first after 1, 2, 4, ... steps.
        sweep_every: steps in which every row is looked at once for demotion.
        flat_below_bytes: tables whose fp32 weights take no more than this stay fp32.
        tables: what differs, by table name.
        protect: tables that stay fp32.
    """

    budget: str = ""
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] = LEVELS
    positive_weight: float = Field(default=4.0, ge=0)
    decay: float = Field(default=0.001, gt=0, lt=1)
    spread: float = Field(default=4.0, gt=1)
    hysteresis: float = Field(default=0.2, ge=0, lt=1)
    rebalance_every: int = Field(default=100, ge=1)
    sweep_every: int = Field(default=64, ge=1)
    flat_below_bytes: int = Field(default=1 << 20, ge=0)
    tables: dict[str, TableTiers] = Field(default_factory=dict)
    protect: tuple[str, ...] = ()
    storage: TierStorage = TierStorage()

    @property
    def enabled(self) -> bool:
        """Whether there are tiers."""
        return bool(self.budget)

    @model_validator(mode="after")
    def _has_budget(self) -> "TierConfig":
        given = {"levels": self.levels != LEVELS, "tables": self.tables, "protect": self.protect}
        for name, wanted in {**given, "storage": self.storage != TierStorage()}.items():
            if wanted and not self.enabled:
                raise ValueError(
                    f"tiers.{name} is given, but without a budget there are no tiers; set tiers.budget to a share such "
                    f"as 40%, or remove tiers.{name}"
                )
        return self
