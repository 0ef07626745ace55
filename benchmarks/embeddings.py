"""Lookup and update of embedding rows beside FBGEMM's CPU kernels and ``nn.EmbeddingBag``.

``python -m benchmarks.embeddings [--quick] [--json PATH]``

Eight tables, bags of 1 or 20 ids, batch 2,048, row-wise Adagrad; ids uniform, or Zipf with exponent 1.05 or 1.2 over
shuffled rows. One process; the contestants take their turns, each turn with other ids; milliseconds are CPU time of the
calling thread (of the process where there are two threads) and wall time, ratios those of one round.

The allocator keeps freed memory, for all alike: else every output of megabytes is mapped and faulted in anew, which
takes longer than a lookup.

``forward`` is the lookup alone. ``backward`` is everything else that a training step takes: for ours finding the
distinct rows and updating them, for FBGEMM ``backward()``. The roofline is the time of a loop that touches every cache
line of the same rows, in the same order and with prefetch, and does nothing with them.
"""

import gc
from collections.abc import Callable
from ctypes import CDLL, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from benchmarks import measure
from thresher.embeddings.kernels.backend import Backend, Table, pick_backend
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.native.library import load
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier

TABLES = 8
BATCH = 2048
MIX = {Tier.FP32: 0.05, Tier.FP16: 0.15, Tier.INT8: 0.80}
OPTIMIZER = TableOptimizer(name="rowwise_adagrad", lr=0.01)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
DISTRIBUTIONS = {"uniform": 0.0, "zipf 1.05": 1.05, "zipf 1.2": 1.2}


@dataclass(frozen=True)
class Shape:
    """The tables."""

    dim: int

    @property
    def rows(self) -> int:
        """Rows of a table: a million, or as many as keep all contestants within memory."""
        return min(1_000_000, 64_000_000 // self.dim)


@dataclass(frozen=True)
class Case:
    """One setting."""

    shape: Shape
    length: int
    exponent: float
    threads: int


def ids_of(case: Case, number: int) -> Bags:
    """A batch for all tables."""
    generator = np.random.default_rng([number, case.shape.dim, case.length])
    n = TABLES * BATCH * case.length
    if case.exponent:
        weights = np.arange(1, case.shape.rows + 1, dtype=np.float64) ** -case.exponent
        ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), generator.random(n)).clip(max=case.shape.rows - 1)
        drawn = np.random.default_rng(0).permutation(case.shape.rows)[ranks]
    else:
        drawn = generator.integers(0, case.shape.rows, n)
    offsets = torch.arange(0, n + 1, case.length)
    return Bags(torch.from_numpy(drawn), offsets, None, tuple(range(TABLES)), (BATCH,) * TABLES, Pooling.SUM)


class Ours:
    """Our kernels on flat or tiered tables."""

    def __init__(self, shape: Shape, tiered: bool, backend: Backend) -> None:
        self.backend, self.shape = backend, shape
        make = self._tiered if tiered else self._flat
        self.tables: list[Table] = [make(number) for number in range(TABLES)]

    def forward(self, bags: Bags) -> Tensor:
        """Vectors [B, all widths]."""
        return self.backend.lookup(self.tables, bags)

    def backward(self, bags: Bags, grad: Tensor) -> None:
        """Finds the distinct rows and updates them."""
        found = self.backend.sort(self.tables, bags)
        for table in self.tables:
            table.advance()
        rules = [OPTIMIZER.rule(OPTIMIZER.lr, table.step) for table in self.tables]
        self.backend.update(self.tables, found, grad, rules)

    def _flat(self, number: int) -> FlatTable:
        table = FlatTable(f"t{number}", self.shape.rows, self.shape.dim, scalar=True, vectors=0)
        table.weights.uniform_(-0.01, 0.01)
        return table

    def _tiered(self, number: int) -> TieredTable:
        shape = self.shape
        table = TieredTable(
            f"t{number}", f"t{number}", shape.rows, shape.dim, seed=0, init_scale=0.01, scalar=True, vectors=0
        )
        rows = torch.randperm(shape.rows, generator=torch.Generator().manual_seed(number))
        start = 0
        for tier, share in MIX.items():
            part = rows[start : start + round(share * shape.rows)].sort().values
            start += len(part)
            for some in torch.split(part, 100_000):
                values = torch.empty(len(some), shape.dim).uniform_(-0.01, 0.01)
                self.backend.write(table, some, values, torch.full_like(some, int(tier)))
        return table


class Fbgemm:
    """FBGEMM's CPU kernels."""

    def __init__(self, shape: Shape, optimizer: EmbOptimType) -> None:
        place, device = EmbeddingLocation.HOST, ComputeDevice.CPU
        self._module = SplitTableBatchedEmbeddingBagsCodegen(
            [(shape.rows, shape.dim, place, device)] * TABLES,
            optimizer=optimizer,
            learning_rate=OPTIMIZER.lr,
            eps=OPTIMIZER.eps,
            bounds_check_mode=BoundsCheckMode.FATAL,
        )
        self._module.init_embedding_weights_uniform(-0.01, 0.01)
        self._out: Tensor | None = None

    def forward(self, bags: Bags) -> Tensor:
        """Vectors [B, all widths]; under autograd, for :meth:`backward`."""
        out: Tensor = self._module(bags.ids, bags.offsets)
        self._out = out
        return out

    def backward(self, bags: Bags, grad: Tensor) -> None:
        """Updates the rows of the last forward."""
        assert self._out is not None
        self._out.backward(grad)  # type: ignore[no-untyped-call]
        self._out = None


class Torch:
    """``nn.EmbeddingBag`` on the rows of a flat contestant; forward only."""

    def __init__(self, flat: Ours) -> None:
        self._weights = [table.weights for table in flat.tables if isinstance(table, FlatTable)]

    def forward(self, bags: Bags) -> Tensor:
        """Vectors [B, all widths]."""
        length = len(bags.ids) // TABLES
        ids = bags.ids.view(TABLES, -1)
        offsets = bags.offsets[:BATCH]
        parts = zip(ids, self._weights, strict=True)
        assert ids.shape[1] == length
        return torch.cat([torch.nn.functional.embedding_bag(i, w, offsets, mode="sum") for i, w in parts], 1)


class Turns:
    """Work that meets other ids each time; every contestant meets the same ones."""

    def __init__(self, batches: list[Bags], work: Callable[[Bags], object], clock: Callable[[], float]) -> None:
        self._batches, self._work, self._clock, self._turn = batches, work, clock, 0
        self.walls: list[float] = []

    def seconds(self) -> float:
        """Seconds of the next turn by the clock; wall seconds are kept."""
        bags = self._batches[self._turn % len(self._batches)]
        self._turn += 1
        wall, start = measure.wall(), self._clock()
        self._work(bags)
        spent = self._clock() - start
        self.walls.append(measure.wall() - wall)
        return spent


def roofline(flat: Ours, batches: list[Bags]) -> dict[str, Callable[[Bags], object]]:
    """Loops that touch the rows of a lookup, and those of an update with their optimizer scalars."""
    library = load()
    assert library is not None, "the roofline is measured by compiled code"
    touch_read, touch_write = library.functions.th_touch_read, library.functions.th_touch_write
    for touch in (touch_read, touch_write):
        touch.argtypes = (c_void_p, c_int64, c_void_p, c_int64)
    found = {id(bags): flat.backend.sort(flat.tables, bags).unique for bags in batches}
    row_bytes = flat.shape.dim * 4

    def read(bags: Bags) -> None:
        for table, ids in zip(flat.tables, bags.ids.view(TABLES, -1), strict=True):
            assert isinstance(table, FlatTable)
            touch_read(table.weights.data_ptr(), row_bytes, ids.data_ptr(), len(ids))

    def write(bags: Bags) -> None:
        for table, rows in zip(flat.tables, found[id(bags)], strict=True):
            assert isinstance(table, FlatTable)
            touch_write(table.weights.data_ptr(), row_bytes, rows.data_ptr(), len(rows))
            touch_write(table.scalar.data_ptr(), 4, rows.data_ptr(), len(rows))

    return {"read": read, "write": write}


class Field:
    """The contestants on tables of one shape."""

    def __init__(self, shape: Shape) -> None:
        backend = pick_backend(torch.device("cpu"))
        self.flat = Ours(shape, False, backend)
        self.everyone: dict[str, Ours | Fbgemm] = {
            "flat": self.flat,
            "tiered": Ours(shape, True, backend),
            "fbgemm": Fbgemm(shape, EmbOptimType.EXACT_ROWWISE_ADAGRAD),
            "fbgemm_sgd": Fbgemm(shape, EmbOptimType.EXACT_SGD),
        }

    def race(self, case: Case, repetitions: int) -> dict[str, Any]:
        """Milliseconds and ratios of one setting."""
        torch.set_num_threads(case.threads)
        batches = [ids_of(case, number) for number in range(8)]
        grad = torch.randn(BATCH, TABLES * case.shape.dim, generator=torch.Generator().manual_seed(1)) * 1e-3
        clock = measure.thread_cpu if case.threads == 1 else measure.process_cpu
        # A peer's backward belongs to its forward; forwards come first in each round.
        turns = {f"{name} forward": Turns(batches, one.forward, clock) for name, one in self.everyone.items()}
        turns["torch forward"] = Turns(batches, Torch(self.flat).forward, clock)
        if case.threads == 1:
            for name, work in roofline(self.flat, batches).items():
                turns[f"roofline {name}"] = Turns(batches, work, clock)
        for name, one in self.everyone.items():
            turns[f"{name} backward"] = Turns(batches, partial(one.backward, grad=grad), clock)
        # Nothing here makes garbage in cycles, and a collection takes longer than most turns.
        gc.collect()
        gc.disable()
        timings = measure.interleaved_seconds({name: turn.seconds for name, turn in turns.items()}, repetitions, 2)
        gc.enable()
        walls = {name: measure.Timing(tuple(turn.walls[2:])) for name, turn in turns.items()}
        unique = sum(len(rows) for rows in self.flat.backend.sort(self.flat.tables, batches[0]).unique)
        return {"lookups": len(batches[0].ids), "unique_rows": unique} | figures(timings, walls)


def figures(timings: dict[str, measure.Timing], walls: dict[str, measure.Timing]) -> dict[str, Any]:
    """Milliseconds by contestant, and the ratios that are claimed."""
    found: dict[str, Any] = {f"{name.replace(' ', '_')}_ms": timing.median_s * 1e3 for name, timing in timings.items()}
    pairs = {
        "backward_vs_fbgemm": ("flat backward", "fbgemm backward"),
        "backward_vs_fbgemm_sgd": ("flat backward", "fbgemm_sgd backward"),
        "tiered_backward_vs_fbgemm": ("tiered backward", "fbgemm backward"),
        "forward_vs_fbgemm": ("flat forward", "fbgemm forward"),
        "forward_vs_torch": ("flat forward", "torch forward"),
        "tiered_forward_vs_flat": ("tiered forward", "flat forward"),
    }
    for name, (ours, theirs) in pairs.items():
        found[name] = measure.ratio(timings[ours], timings[theirs])
        found[f"{name}_wall"] = measure.ratio(walls[ours], walls[theirs])
    if "roofline read" in timings:
        found["forward_of_roofline"] = measure.ratio(timings["flat forward"], timings["roofline read"])
        found["backward_of_roofline"] = measure.ratio(timings["flat backward"], timings["roofline write"])
    return found


def cases(shape: Shape, threads: tuple[int, ...]) -> dict[str, Case]:
    """All settings on tables of one shape, by name."""
    return {
        f"D={shape.dim} L={length} {name} t={t}": Case(shape, length, exponent, t)
        for t in threads
        for length in (1, 20)
        for name, exponent in DISTRIBUTIONS.items()
    }


def keep_freed_memory() -> None:
    """Tells glibc to return nothing to the system and to serve large blocks from its heap, too."""
    libc = CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that glibc accepts


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("embeddings: lookup and update beside FBGEMM and nn.EmbeddingBag")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    given = parser.parse_args()
    chosen = measure.options(given)
    keep_freed_memory()
    found: dict[str, dict[str, Any]] = {}
    for dim in (64,) if chosen.quick else (16, 32, 64, 128):
        some = cases(Shape(dim), (1,) if chosen.quick else (1, 2))
        wanted = {name: case for name, case in some.items() if given.only in name}
        field = Field(Shape(dim)) if wanted else None
        for name, case in wanted.items():
            assert field is not None
            found[name] = field.race(case, 5 if chosen.quick else 11)
    shown = {
        "backward_vs_fbgemm": "bwd / FBGEMM",
        "backward_vs_fbgemm_sgd": "bwd / its SGD",
        "forward_vs_fbgemm": "fwd / FBGEMM",
        "forward_vs_torch": "fwd / torch",
        "tiered_forward_vs_flat": "tiered fwd / flat",
        "backward_of_roofline": "bwd of roofline",
        "forward_of_roofline": "fwd of roofline",
        "flat_backward_ms": "bwd ms",
        "flat_forward_ms": "fwd ms",
    }
    rows = [[name, *(one.get(key, float("nan")) for key in shown)] for name, one in found.items()]
    worst = {key: min(one[key] for one in found.values() if key in one) for key in list(shown)[:7]}
    worst["tiered_forward_uniform"] = min(
        (one["tiered_forward_vs_flat"] for name, one in found.items() if "uniform" in name), default=float("nan")
    )
    results = {"cases": found, "worst": worst}
    measure.report("Ours is so many times faster", ["setting", *shown.values()], rows, results, chosen, threads=2)


if __name__ == "__main__":
    main()
