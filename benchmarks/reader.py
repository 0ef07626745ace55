"""Rows per second of CPU time from Parquet to batches, beside a plain pyarrow loop and FuxiCTR's loaders.

``python -m benchmarks.reader [--rows N] [--quick] [--json PATH]``

The data are Criteo-like: 26 id columns with the Kaggle set's numbers of values, ids spread log-uniformly, 13 floats and
a label. An epoch of each in turn, in one thread, by the CPU time of that thread. Two rows use more: ours with threads
ahead of the consumer (all threads count), and FuxiCTR's Parquet loader, which stands on Ray Data and runs in a process
of its own (that process and those Ray starts for it count; Ray has two CPUs, since its pipeline stalls with one).
Opening the files is part of ours and of the pyarrow loop; what FuxiCTR does before the first epoch (reading an npz file
into memory, counting rows) is not part of its time.
"""

import logging
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec import KeyedJaggedTensor

from benchmarks import measure
from thresher.data.dataset import Dataset
from thresher.data.reader import Reader
from thresher.data.schema import Schema
from thresher.data.writer import DatasetWriter

BATCH = 4096
WINDOW_ROWS = 1 << 19
CARDINALITIES = (
    *(1460, 583, 1_000_000, 1_000_000, 305, 24, 12517, 633, 3, 93145, 5683, 1_000_000, 3194, 27, 14992, 1_000_000),
    *(10, 5652, 2173, 4, 1_000_000, 18, 15, 286_181, 105, 142_572),
)
IDS = tuple(f"C{i + 1}" for i in range(len(CARDINALITIES)))
FLOATS = tuple(f"I{i + 1}" for i in range(13))
SCHEMA = Schema.model_validate(
    {
        "name": "criteo_like",
        "tables": [{"name": n, "rows": r, "ids": "index"} for n, r in zip(IDS, CARDINALITIES, strict=True)],
        "features": [
            *({"kind": "sparse", "name": name, "table": name} for name in IDS),
            *({"kind": "dense", "name": name} for name in FLOATS),
            {"kind": "label", "name": "label"},
        ],
    }
)


def chunks(rows: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Synthetic encoded rows, 2**17 at a time."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, 1 << 17):
        n = min(1 << 17, rows - start)
        columns: dict[str, np.ndarray[Any, Any]] = {
            name: (limit ** rng.random(n)).astype(np.int64) % limit
            for name, limit in zip(IDS, CARDINALITIES, strict=True)
        }
        columns |= {name: np.log1p(rng.exponential(10, n)).astype(np.float32) for name in FLOATS}
        columns["label"] = (rng.random(n) < 0.25).astype(np.float32)
        yield columns


def prepare(folder: Path, rows: int) -> Dataset:
    """The rows as a prepared data set, and as the files the others read."""
    writer = DatasetWriter(folder / "prepared", SCHEMA, "criteo_like", {"rows": rows})
    parts = list(chunks(rows))
    for part in parts:
        writer.write("train", pa.table(part))
    (folder / "parquet").mkdir()
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pq.write_table(pa.table(whole), folder / "parquet" / "train.parquet", row_group_size=1 << 16)
    np.savez(folder / "train.npz", allow_pickle=False, **whole)
    return writer.finish({})


def ours(dataset: Dataset, batches: int, prefetch: int) -> None:
    """Globally shuffled batches from cursor 0, everything included."""
    reader = Reader(dataset, "train", batch_size=BATCH, window_rows=WINDOW_ROWS, prefetch=prefetch)
    for _ in islice(reader.stream(0), batches):
        pass
    reader.close()


def plain_loop(path: Path) -> None:
    """What one writes in an afternoon: row groups in random order, rows shuffled within each; no cursor, no checks."""
    rng = np.random.default_rng(0)
    file = pq.ParquetFile(path, memory_map=True)
    lengths = torch.ones(len(IDS) * BATCH, dtype=torch.int32)
    for group in rng.permutation(file.num_row_groups).tolist():
        table = file.read_row_group(group, use_threads=False)
        order = rng.permutation(table.num_rows)
        ids = np.stack([table[name].to_numpy()[order] for name in IDS])
        floats = np.stack([table[name].to_numpy()[order] for name in (*FLOATS, "label")])
        for start in range(0, table.num_rows - BATCH + 1, BATCH):
            values = torch.from_numpy(ids[:, start : start + BATCH]).reshape(-1)
            KeyedJaggedTensor(list(IDS), values, lengths=lengths, stride=BATCH)
            torch.from_numpy(floats[:, start : start + BATCH]).T.contiguous()


def fuxictr_loader(folder: Path, data_format: str, workers: int) -> Iterable[Any]:
    """FuxiCTR's loader of training rows, as it is published."""
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader

    fields = FeatureMap("criteo_like", str(folder))
    fields.features.update({name: {"type": "categorical", "source": ""} for name in IDS})
    fields.features.update({name: {"type": "numeric", "source": ""} for name in FLOATS})
    fields.labels = ["label"]
    fields.set_column_index()
    data = folder / ("train.npz" if data_format == "npz" else "parquet")
    options = {"batch_size": BATCH, "shuffle": True, "data_format": data_format, "num_workers": workers}
    loader, _ = RankDataLoader(fields, stage="train", train_data=str(data), **options)
    return loader  # type: ignore[no-any-return]


def exhaust(loader: Iterable[Any]) -> None:
    """One epoch of a loader."""
    for _ in loader:
        pass


def tree_cpu() -> float:
    """CPU seconds of this process and of all it started that still run."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def serve_ray_epochs(folder: Path, pipe: Connection) -> None:
    """Runs an epoch of FuxiCTR's Parquet loader at each request and answers with its CPU seconds."""
    import ray

    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    loader = fuxictr_loader(folder, "parquet", 1)
    while pipe.recv():
        start = tree_cpu()
        exhaust(loader)
        pipe.send(tree_cpu() - start)
    ray.shutdown()


@contextmanager
def ray_epochs(folder: Path) -> Iterator[Callable[[], float]]:
    """A function that runs an epoch in a process of its own and returns its CPU seconds."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_ray_epochs, args=(folder, there))
    process.start()

    def epoch() -> float:
        here.send(True)
        return float(here.recv())

    try:
        yield epoch
    finally:
        here.send(False)
        process.join(60)
        process.kill()


NAMES = {
    "ours": "Thresher, one thread (prefetch=0): global shuffle, cursor, checks",
    "ours_ahead": "Thresher, two threads ahead (prefetch=4)",
    "pyarrow_loop": "pyarrow loop: shuffle within row groups only",
    "fuxictr_npz": "FuxiCTR RankDataLoader, npz in memory, one thread",
    "fuxictr_parquet": "FuxiCTR RankDataLoader, Parquet through Ray Data",
}


def measured(folder: Path, rows: int, repetitions: int) -> dict[str, measure.Timing]:
    """CPU seconds of an epoch of each, in turn; the first round does not count."""
    dataset = prepare(folder, rows)
    batches = rows // BATCH
    work: dict[str, Callable[[], float]] = {
        "ours": lambda: measure.timed(lambda: ours(dataset, batches, 0), measure.thread_cpu),
        "ours_ahead": lambda: measure.timed(lambda: ours(dataset, batches, 4), measure.process_cpu),
        "pyarrow_loop": lambda: measure.timed(lambda: plain_loop(folder / "parquet/train.parquet"), measure.thread_cpu),
    }
    with ExitStack() as stack:
        if find_spec("fuxictr") is not None:
            npz = fuxictr_loader(folder, "npz", 0)
            work["fuxictr_npz"] = lambda: measure.timed(lambda: exhaust(npz), measure.thread_cpu)
            work["fuxictr_parquet"] = stack.enter_context(ray_epochs(folder))
        return measure.interleaved_seconds(work, repetitions)


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("reader: rows per second of CPU time")
    parser.add_argument("--rows", type=int, default=0, help="default 1,000,000; 300,000 with --quick")
    given = parser.parse_args()
    chosen = measure.options(given)
    rows = given.rows or (300_000 if chosen.quick else 1_000_000)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    folder = Path(tempfile.mkdtemp(prefix="thresher-reader-"))
    try:
        times = measured(folder, rows, 2 if chosen.quick else 5)
    finally:
        shutil.rmtree(folder)
    results: dict[str, Any] = {"rows": rows, "batch_size": BATCH, "window_rows": WINDOW_ROWS}
    table: list[list[object]] = []
    for name, title in NAMES.items():
        if name not in times:
            table.append([title, "not installed", "", ""])
            continue
        timing = times[name]
        results[name] = {
            "rows_per_s": rows / timing.median_s,
            "spread": timing.spread,
            "ours_is_faster_by": measure.ratio(times["ours"], timing),
        }
        table.append([title, *results[name].values()])
    measure.report(
        f"Reader, {rows:,} rows of 26 ids, 13 floats, 1 label; CPU time",
        ["loader", "rows/s of CPU", "spread", "ours is faster by"],
        table,
        results,
        chosen,
    )


if __name__ == "__main__":
    main()
