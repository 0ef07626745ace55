"""What all benchmarks share: the machine's description, interleaved medians, and how results are shown and kept.

Every benchmark is run as ``python -m benchmarks.NAME [--quick] [--json PATH]``. It prints a table and then one line of
JSON, ``{"environment": {...}, "results": {...}}``, which ``--json`` writes to a file instead.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LIBRARIES = ("torch", "torchrec", "fbgemm-gpu", "numpy", "pyarrow", "fuxictr")


@dataclass(frozen=True)
class Timing:
    """Repetitions of one piece of work.

    Attributes:
        seconds: the chosen clock, one value a repetition, in the order they ran.
    """

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median seconds of a repetition."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(max - min) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median_s


def thread_cpu() -> float:
    """CPU seconds of the calling thread."""
    return time.thread_time()


def process_cpu() -> float:
    """CPU seconds of all threads of this process, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def wall() -> float:
    """Wall-clock seconds from an arbitrary origin."""
    return time.perf_counter()


def timed(run: Callable[[], object], clock: Callable[[], float] = thread_cpu) -> float:
    """Seconds that ``run()`` takes by a clock; garbage is collected before, not within."""
    gc.collect()
    gc.disable()
    start = clock()
    run()
    spent = clock() - start
    gc.enable()
    return spent


def interleaved(
    work: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = thread_cpu,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Times several pieces of work in turn, so that a disturbance of the machine meets all of them.

    ``A B C A B C ...``: ``warm_up`` rounds that do not count, then ``repetitions`` that do.

    Args:
        work: name to a function that does the work once.
        repetitions: counted rounds, at least 1.
        clock: seconds; :func:`thread_cpu`, :func:`process_cpu` (for work with threads) or :func:`wall`.
        warm_up: rounds before them.
    """
    return interleaved_seconds({name: partial(timed, run, clock) for name, run in work.items()}, repetitions, warm_up)


def interleaved_seconds(
    work: Mapping[str, Callable[[], float]], repetitions: int, warm_up: int = 1
) -> dict[str, Timing]:
    """:func:`interleaved` for work that measures itself and returns seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + repetitions):
        for name, run in work.items():
            spent = run()
            if turn >= warm_up:
                seconds[name].append(spent)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(ours: Timing, theirs: Timing) -> float:
    """How many times faster ours is: the median over repetitions of theirs / ours within the same round."""
    return statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True))


def environment(threads: int = 1) -> dict[str, Any]:
    """Facts a figure depends on: processor, cores, memory, versions, commit, date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    root = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


@dataclass(frozen=True)
class Options:
    """The command line every benchmark has.

    Attributes:
        quick: smaller and fewer repetitions, for a look; not for claims.
        json: where to write the JSON; None prints it.
    """

    quick: bool
    json: Path | None


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--quick`` and ``--json``; a benchmark may add its own options."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="smaller and fewer repetitions; not for claims")
    made.add_argument("--json", type=Path, default=None, metavar="PATH", help="write the JSON there, not to stdout")
    return made


def options(given: argparse.Namespace) -> Options:
    """The common part of a parsed command line."""
    return Options(quick=given.quick, json=given.json)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; floats are shown with three significant digits."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(width=140).print(table)


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    results: Mapping[str, Any],
    chosen: Options,
    threads: int = 1,
) -> None:
    """Prints the table, then prints or writes ``{"environment": ..., "results": ...}``.

    Args:
        title: stands above the table.
        columns: heads of the table.
        rows: cells; floats are shown with three significant digits.
        results: plain values; a claim points into it by a dotted path such as ``results.ours.rows_per_s``.
        chosen: the command line.
        threads: compute threads used, for the environment.
    """
    show(title, columns, rows)
    text = json.dumps({"environment": environment(threads), "options": _plain(chosen), "results": results})
    if chosen.json is None:
        print(text)
    else:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(text + "\n", encoding="utf-8")


def _plain(chosen: Options) -> dict[str, Any]:
    return {key: value for key, value in asdict(chosen).items() if key != "json"}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
