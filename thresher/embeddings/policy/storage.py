"""Tables larger than memory: slabs in files, of which a bounded part is in memory.

The files hold nothing that outlives the process: each is unlinked as soon as it is mapped, so the system frees it even
if the process is killed. Their pages come into memory as rows are read; when they exceed what is allowed, all are
dropped from the process at the end of a step, and come back from the page cache or the disk as they are needed.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from thresher.embeddings.policy.config import TierStorage
from thresher.embeddings.policy.plan import parse_levels
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import STORED, Tier, record_bytes
from thresher.errors import PlanError

WHERE = "tiers.storage"
LEAST_FREE_BYTES = 256_000_000
"""A write to a mapped file on a full disk kills the process without a word; training stops before."""
WRITABLE = "set it to a folder that can be written, on a disk with room for the tables"
_STATUS = Path("/proc/self/status")


class SlabFiles:
    """The files of this process's shards.

    Raises:
        ConfigError: a tier is unknown.
    """

    def __init__(self, storage: TierStorage) -> None:
        self.storage = storage
        self._tiers = parse_levels(storage.tiers, f"{WHERE}.tiers")
        self._tables: list[TieredTable] = []
        self._promised_bytes = 0
        self._libraries_bytes = mapped_bytes()

    @property
    def enabled(self) -> bool:
        """Whether there are files at all."""
        return self.storage.folder != Path()

    def paths(
        self, path: str, levels: Sequence[Tier], rows: int, cols: int, vectors: int, row0: int = 0, col0: int = 0
    ) -> dict[Tier, Path]:
        """Files for the slabs of a [rows, cols] shard of the table ``path``; give them to ``TieredTable``.

        Names differ by process: two runs may share the folder.

        Raises:
            PlanError: the folder cannot be made, or its disk could not hold all rows of the shard in the largest tier
                that goes there.
        """
        chosen = [tier for tier in levels if tier in self._tiers and tier in STORED]
        if not self.enabled or not chosen:
            return {}
        self._promise(path, rows * max(record_bytes(tier, cols, vectors) for tier in chosen))
        stem = f"{path.replace('/', '_')}.{row0}.{col0}"
        return {tier: self.storage.folder / f"{stem}.{tier.name.lower()}.{os.getpid()}" for tier in chosen}

    def adopt(self, table: TieredTable, paths: Sequence[Path]) -> None:
        """Takes a table over whose slabs are mapped now: removes the names of its files."""
        self._tables.append(table)
        for path in paths:
            path.unlink()

    def after_step(self) -> None:
        """Drops mapped pages if there are more than allowed.

        Raises:
            PlanError: the disk is almost full.
        """
        if not self._tables:
            return
        if mapped_bytes() - self._libraries_bytes > self.storage.ram_gb * 1e9:
            for table in self._tables:
                table.unload()
        free = shutil.disk_usage(self.storage.folder).free
        if free < LEAST_FREE_BYTES:
            raise self._refused(f"only {free / 1e6:.0f} MB are free on the disk", "free disk space")

    def _promise(self, path: str, size_bytes: int) -> None:
        try:
            self.storage.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(f"no folder can be made there ({error.strerror})", WRITABLE) from None
        free = shutil.disk_usage(self.storage.folder).free - self._promised_bytes
        if size_bytes + LEAST_FREE_BYTES > free:
            raise self._refused(
                f"table '{path}' may need {size_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free on the disk",
                "choose a folder on a larger disk, or keep larger tiers in memory",
            )
        self._promised_bytes += size_bytes

    def _refused(self, what: str, fix: str) -> PlanError:
        return PlanError(what, where=f"{WHERE}.folder {self.storage.folder}", fix=fix)


def mapped_bytes() -> int:
    """Bytes of files and shared memory that are mapped and present in this process."""
    lines = (line.split() for line in _STATUS.read_text(encoding="ascii").splitlines())
    return sum(int(line[1]) * 1024 for line in lines if line[0] in ("RssFile:", "RssShmem:"))
