"""A table larger than memory: filled row by row in a file, then trained with random ids, in bounded memory.

``python -m benchmarks.disk_table [--gb 30] [--folder PATH] [--quick] [--json PATH]``

The table has fp32 rows of 64 columns and row-wise Adagrad; weights are in a file, 16 bytes a row in memory. Every row
is written before training starts, so that the file takes its whole size on the disk. Peak memory is the kernel's own
high water mark of the process (``VmHWM``): libraries, the mapped part of the file, everything. At the end rows that
training never met must still be what was written, and rows that it met must not.
"""

import os
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from thresher.embeddings.group import TableGroup
from thresher.embeddings.init import init_scale, initial_rows
from thresher.embeddings.kernels.backend import Backend, pick_backend
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierStorage
from thresher.embeddings.policy.storage import SlabFiles
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

DIM = 64
SEED = 5
PATH = "bags.big"
CHUNK_ROWS = 1 << 18
BATCH = 8192
THREADS = 2
OPTIMIZER = TableOptimizer(lr=0.05)
ZIPF = 1.2


@dataclass(frozen=True)
class Phase:
    """Steps with ids of one distribution.

    Attributes:
        rows_per_s: ids looked up and updated, by the wall clock.
        distinct_share: of the ids of a step.
        major_faults: pages that came from the disk, per step.
        step_ms: median.
    """

    rows_per_s: float
    distinct_share: float
    major_faults: float
    step_ms: float


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status, such as ``VmHWM`` (peak memory)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == f"{field}:")


class DiskTable:
    """The table, its file, and how it is filled and trained."""

    def __init__(self, size_bytes: int, storage: TierStorage, backend: Backend) -> None:
        self.rows, self.backend = size_bytes // (DIM * 4), backend
        self.files = SlabFiles(storage)
        paths = self.files.paths(PATH, (Tier.FP32,), self.rows, DIM, 0)
        self.table = TieredTable(
            "big",
            PATH,
            self.rows,
            DIM,
            seed=SEED,
            init_scale=init_scale(self.rows),
            scalar=True,
            vectors=0,
            levels=(Tier.FP32,),
            entry=Tier.FP32,
            files=paths,
        )
        self._file = os.open(paths[Tier.FP32], os.O_RDONLY)
        self.files.adopt(self.table, list(paths.values()))
        self.group = TableGroup([self.table], [0], Pooling.SUM, OPTIMIZER, backend)

    def initial(self, first: int, count: int) -> Tensor:
        """[count, DIM]"""
        return torch.from_numpy(initial_rows(SEED, PATH, first, count, DIM, self.table.init_scale))

    def fill(self) -> float:
        """Writes every row; seconds."""
        start = measure.wall()
        for first in range(0, self.rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, self.rows - first)
            rows = torch.arange(first, first + count)
            self.backend.write(self.table, rows, self.initial(first, count), torch.full((count,), int(Tier.FP32)))
            self.files.after_step()
        os.fsync(self._file)
        return measure.wall() - start

    def stored_bytes(self) -> int:
        """What the file takes on the disk."""
        return os.fstat(self._file).st_blocks * 512

    def train(self, batches: list[Tensor]) -> Phase:
        """One update for each batch of ids."""
        offsets = torch.arange(BATCH + 1)
        faults, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, []
        for ids in batches:
            start = measure.wall()
            out = self.group(ids, offsets)
            torch.autograd.backward([out], [out.detach()])
            self.files.after_step()
            seconds.append(measure.wall() - start)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
        return Phase(
            rows_per_s=BATCH * len(batches) / sum(seconds),
            distinct_share=float(np.mean([len(np.unique(ids)) / BATCH for ids in batches])),
            major_faults=faults / len(batches),
            step_ms=1e3 * float(np.median(seconds)),
        )

    def wrong_rows(self, trained: Tensor, samples: int) -> int:
        """Of ``samples`` blocks of 8 rows: rows that training did not meet and that changed, or met and did not."""
        met = set(trained.tolist())
        wrong = 0
        for first in np.random.default_rng(9).integers(0, self.rows - 8, samples).tolist():
            rows = torch.arange(first, first + 8)
            same = (self.backend.read(self.table, rows) == self.initial(first, 8)).all(1).tolist()
            wrong += sum(equal == (row in met) for row, equal in zip(rows.tolist(), same, strict=True))
        return wrong


def uniform_ids(rows: int, steps: int) -> list[Tensor]:
    """[BATCH] ids a step, all rows alike."""
    rng = np.random.default_rng(1)
    return [torch.from_numpy(rng.integers(0, rows, BATCH)) for _ in range(steps)]


def skewed_ids(rows: int, steps: int) -> list[Tensor]:
    """[BATCH] ids a step with P(k-th row) ~ k^-1.2, the popular ones spread over the table."""
    rng = np.random.default_rng(2)
    return [torch.from_numpy(rng.zipf(ZIPF, BATCH) % rows * 2654435761 % rows) for _ in range(steps)]


def measured(size_bytes: int, storage: TierStorage, steps: int) -> dict[str, Any]:
    """Fills, trains, checks."""
    began = time.time()
    made = DiskTable(size_bytes, storage, pick_backend(torch.device("cpu")))
    fill_s = made.fill()
    stored = made.stored_bytes()
    uniform, skewed = uniform_ids(made.rows, steps), skewed_ids(made.rows, steps)
    phases = {"uniform": asdict(made.train(uniform)), "zipf": asdict(made.train(skewed))}
    trained = torch.cat([*uniform, *skewed])
    return {
        "backend": made.backend.name,
        "rows": made.rows,
        "table_gb": made.rows * DIM * 4 / 1e9,
        "on_disk_gb": stored / 1e9,
        "headers_gb": made.rows * 16 / 1e9,
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "ram_gb": storage.ram_gb,
        "peak_rss_gb": status_bytes("VmHWM") / 1e9,
        "fill_s": fill_s,
        "fill_gb_per_s": stored / 1e9 / fill_s,
        **phases,
        "trained_rows": len(np.unique(trained)),
        "wrong_rows": made.wrong_rows(trained, 2000),
        "total_s": time.time() - began,
    }


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("a table larger than memory, in a file")
    parser.add_argument("--gb", type=float, default=0.0, help="bytes of the weights / 1e9; 30, or 1 with --quick")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to use; a temporary one by default")
    given = parser.parse_args()
    chosen = measure.options(given)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="thresher-disk-", dir=given.folder) as folder:
        storage = TierStorage(folder=Path(folder), tiers=("fp32",), ram_gb=2.0)
        size_bytes = int((given.gb or (1 if chosen.quick else 30)) * 1e9)
        results = measured(size_bytes, storage, 50 if chosen.quick else 300)
    rows = [[name, value] for name, value in results.items() if not isinstance(value, dict)]
    rows += [[f"{name}: {key}", value] for name in ("uniform", "zipf") for key, value in results[name].items()]
    measure.report("A table in a file", ["figure", "value"], rows, results, chosen, THREADS)


if __name__ == "__main__":
    main()
