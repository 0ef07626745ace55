"""What a user says about tables keyed by raw ids."""

from typing import Literal

from pydantic import Field

from thresher.settings import Settings


class DynamicTable(Settings):
    """A table whose rows are given to raw 64-bit ids as they come, and taken back.

    The rows of the table are the most ids that have a row at one time; memory grows with those that have one.

    Time is counted in steps (lookups that train), so that a run can be repeated.

    Attributes:
        min_count: an id gets a row at its ``min_count``-th occurrence; before that it reads zeros.
        evict: who loses its row when all are taken: the ids unused for longest (lru), with the fewest occurrences
            (lfu), of the lowest priority (priority; needs tiers), or none: new ids are refused, and counted.
        evict_share: share of all rows that is freed at once when rows run out.
        ttl_steps: ids unused for longer lose their rows, whether rows run out or not; 0 for never.
        sweep_every: steps between two searches for such ids.
        pending_share: ids whose occurrences are counted before admission, at most, as a multiple of the rows; when
            there are more, all counts are halved and those that become 0 are forgotten.
    """

    min_count: int = Field(default=1, ge=1)
    evict: Literal["lru", "lfu", "priority", "none"] = "lru"
    evict_share: float = Field(default=0.01, gt=0, le=1)
    ttl_steps: int = Field(default=0, ge=0)
    sweep_every: int = Field(default=64, ge=1)
    pending_share: float = Field(default=4.0, gt=0)
