"""A table whose rows have different precisions: the storage that all backends share.

Each row has 16 bytes of its own, in two arrays: a lookup reads only the first, an update both.

    desc [rows, 2] int32       place = tier << 29 | slot            scale (fp32 bits)
    stat [rows, 2] fp32        the optimizer's scalar               priority x gain

and, unless its tier is NONE or DROPPED, a record in the slab of its tier (``tiers.py`` has the formats):

    slab[INT8]   | record 0 | record 1 | record 2 | ...      slots 0 .. high-1 are in use or on the free stack
    free[INT8]   [2, ...]                                    a stack of n_free slots

``count`` [6, 2] int64 holds (high, n_free) by tier. Slots carry no meaning: two tables are equal if their rows read the
same, whatever slots hold them.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from thresher.embeddings.rows.region import PAGE_BYTES, Region, forget
from thresher.embeddings.rows.tiers import STORED, Tier, record_bytes
from thresher.errors import PlanError

SLOT_BITS = 29
MAX_SLOTS = 1 << SLOT_BITS
SLOT_MASK = MAX_SLOTS - 1
SPARE_SLOTS = 1 << 24
"""Free slots that an update must find where rows enter: more than it takes, for kernels count them only afterwards."""
HEADER_BYTES = 16
HIGH, FREE = 0, 1
RENORMALISE = 2.0**60


class TieredTable:
    """A rectangle of a table with rows of mixed precision, and the optimizer state of its rows.

    Args:
        name: of the table, for messages.
        path: of the table in the model; with ``seed`` it determines initial values and rounding.
        rows, dim: of this rectangle; ``dim`` is even.
        entry: tier of a row at its first update.
        levels: tiers that rows may have; ``entry`` among them.
        init_scale: initial values are uniform on [-init_scale, init_scale).
        scalar: whether the optimizer keeps one number a row.
        vectors: numbers the optimizer keeps for each weight, in the row's own precision.
        row0, col0, full_dim: this rectangle's first row and column, and the columns of the whole table.
        slots: the most rows each tier may hold; ``rows`` where not given.
        identity: [rows] int64, what a row is known by to the generators in place of ``row0 + row`` (dynamic tables,
            which put other ids there); None for ``row0 + row``.
        files: tiers whose slab lives in a file of that name.

    Attributes:
        desc, stat, count: as above.
        slabs: uint8 bytes by tier, ``record_bytes`` a slot.
        free: int32 stacks of free slots by tier.
        step: updates done; keys the generator.
        released: whether the rows were given up.
        decay: share of its priority that a row loses at each update of the table (beta of SHARK).
        gain: factor of the priorities, (1 - decay)^-step but for renormalisations; a priority is stat[:, 1] / gain.
        promote_above, keep_from: by number of the tier, the priority above which a row moves there, and below which it
            leaves it for a lower one; set by the policy, never before it has decided anything.

    Raises:
        PlanError: ``slots`` are fewer than ``entry`` may need, or more than 2^29.
    """

    def __init__(
        self,
        name: str,
        path: str,
        rows: int,
        dim: int,
        *,
        seed: int,
        init_scale: float,
        scalar: bool,
        vectors: int,
        levels: tuple[Tier, ...] = (Tier.INT8, Tier.FP16, Tier.FP32),
        entry: Tier = Tier.INT8,
        row0: int = 0,
        col0: int = 0,
        full_dim: int = 0,
        slots: Mapping[Tier, int] | None = None,
        identity: Tensor | None = None,
        files: Mapping[Tier, Path] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.path, self.rows, self.dim, self.seed = name, path, rows, dim, seed
        self.row0, self.col0, self.full_dim = row0, col0, full_dim or dim
        self.init_scale, self.has_scalar, self.n_vectors = init_scale, scalar, vectors
        self.levels, self.entry, self.identity = tuple(sorted(levels)), entry, identity
        self.device = torch.device(device)
        self.slots = {tier: (slots or {}).get(tier, min(rows, MAX_SLOTS)) for tier in self.stored_levels}
        self._require_fits()
        self.desc = self._array(rows * 8, None).view(torch.int32)[: rows * 2].view(rows, 2)
        self.stat = self._array(rows * 8, None).view(torch.float32)[: rows * 2].view(rows, 2)
        self.count = torch.zeros(len(Tier), 2, dtype=torch.int64)
        self._regions: dict[Tier, Region] = {}
        self._stacks: dict[Tier, Region] = {}
        self.slabs = {tier: self._slab(tier, (files or {}).get(tier)) for tier in self.stored_levels}
        self.free = {tier: self._stack(tier, n) for tier, n in self.slots.items()}
        self.step = 0
        self.released = False
        self.decay = 0.0
        self.gain = 1.0
        self.promote_above = [math.inf] * len(Tier)
        self.keep_from = [0.0] * len(Tier)

    def advance(self) -> None:
        """Begins the next update: counts it, and lets all priorities decay by ``decay``.

        Nothing is swept: the weight of what is added grows instead, until it has grown by 2^60.

        Raises:
            PlanError: the tier where new rows enter may run out of slots.
        """
        self._require_slots()
        self.step += 1
        self.gain /= 1.0 - self.decay
        if self.gain > RENORMALISE:
            self.stat[:, 1] *= 1.0 / RENORMALISE
            self.gain /= RENORMALISE

    @property
    def stored_levels(self) -> tuple[Tier, ...]:
        """Levels with a record, lowest first."""
        return tuple(tier for tier in self.levels if tier in STORED)

    def record_bytes(self, tier: Tier) -> int:
        """Bytes of one row's record in ``tier``."""
        return record_bytes(tier, self.dim, self.n_vectors)

    def tier_of(self) -> Tensor:
        """[rows] int64: the tier of every row."""
        return (self.desc[:, 0].to(torch.int64) >> SLOT_BITS) & 7

    def live(self, tier: Tier) -> int:
        """Rows in ``tier`` (with a record)."""
        high, free = self.count[tier].tolist()
        return int(high - free)

    @property
    def live_bytes(self) -> int:
        """Bytes of headers and of the records of all rows."""
        return self.header_bytes + sum(self.live(t) * self.record_bytes(t) for t in self.stored_levels)

    @property
    def held_bytes(self) -> int:
        """Bytes that the table keeps committed: as ``live_bytes``, but free slots count, and pages are whole."""
        slabs = sum(_pages(int(self.count[t, HIGH]) * self.record_bytes(t)) for t in self.stored_levels)
        return 2 * _pages(self.header_bytes // 2) + slabs

    @property
    def header_bytes(self) -> int:
        """Bytes of the headers of all rows; 0 after :meth:`release`."""
        return 0 if self.released else self.rows * HEADER_BYTES

    def release(self) -> None:
        """Gives up all rows and their memory: for a table that nothing reads any more. They read as never updated."""
        self.count.zero_()
        for tier in self.stored_levels:
            self.trim(tier)
        for values in (self.desc, self.stat, *self.free.values()):
            forget(values)
        self.decay, self.released = 0.0, True

    def trim(self, tier: Tier) -> None:
        """Gives back the memory beyond slot ``count[tier, HIGH]``, and that of the stack beyond its end."""
        high, n_free = self.count[tier].tolist()
        if tier in self._regions:
            self._regions[tier].forget(high * self.record_bytes(tier))
            self._stacks[tier].forget(n_free * 4)

    def unload(self) -> None:
        """Drops the mapped pages of slabs that live in files."""
        for region in self._regions.values():
            region.unload()

    def _slab(self, tier: Tier, path: Path | None) -> Tensor:
        return self._array(self.slots[tier] * self.record_bytes(tier), path, self._regions, tier)

    def _stack(self, tier: Tier, slots: int) -> Tensor:
        return self._array(slots * 4, None, self._stacks, tier).view(torch.int32)

    def _array(
        self, size_bytes: int, path: Path | None, regions: dict[Tier, Region] | None = None, tier: Tier = Tier.NONE
    ) -> Tensor:
        """[size] uint8 zeros; their region is noted as that of ``tier``."""
        if self.device.type != "cpu":
            return torch.zeros(size_bytes, dtype=torch.uint8, device=self.device)
        region = Region(size_bytes, path)
        if regions is not None:
            regions[tier] = region
        return region.bytes[:size_bytes]

    def _require_fits(self) -> None:
        if self.slots.get(self.entry, self.rows) < min(self.rows, MAX_SLOTS) or max(self.slots.values()) > MAX_SLOTS:
            raise PlanError(
                f"a shard of {self.rows} rows needs {self.rows} slots in tier {self.entry.name.lower()}, "
                f"a tier holds at most {MAX_SLOTS}",
                where=f"table '{self.name}'",
                fix="cut the table by rows over more ranks",
            )

    def _require_slots(self) -> None:
        """Only a tier that cannot hold all rows can run out of slots."""
        if self.rows > MAX_SLOTS and self.live(self.entry) > MAX_SLOTS - SPARE_SLOTS:
            raise PlanError(
                f"{self.live(self.entry)} of a shard's {self.rows} rows are in tier {self.entry.name.lower()}, "
                f"a tier holds at most {MAX_SLOTS}",
                where=f"table '{self.name}'",
                fix="cut the table by rows over more ranks",
            )


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
