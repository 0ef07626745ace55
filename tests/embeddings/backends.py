"""Random lookups and updates that any backend must do exactly as the reference does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from thresher.embeddings.kernels.backend import Backend, Table, UpdateStats
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.records import read_rows
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.kernels.rules import UpdateRule
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import SLOT_MASK, TieredTable
from thresher.embeddings.rows.tiers import LEVELS, STORED, Tier

DIMS = (2, 4, 6, 8, 12, 16, 18, 32, 34, 64, 66, 128)
OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam", "ftrl")
LEVEL_SETS = (
    (Tier.INT8, Tier.FP16, Tier.FP32),
    (Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32),
    (Tier.DROPPED, Tier.INT4, Tier.INT8, Tier.FP16, Tier.FP32),
    (Tier.DROPPED, Tier.INT8, Tier.FP32),
    (Tier.FP16,),
    (Tier.INT8,),
    (Tier.INT4,),
    (Tier.FP32,),
)


@dataclass(frozen=True)
class TableCase:
    """One table: flat if ``levels`` is empty. ``scarce`` limits the slots of levels above ``entry``."""

    rows: int
    dim: int
    levels: tuple[Tier, ...] = ()
    entry: Tier = Tier.INT8
    row0: int = 0
    col0: int = 0
    dynamic: bool = False
    scarce: bool = False

    def build(self, number: int, optimizer: TableOptimizer, device: str) -> Table:
        """A fresh table; state by ``optimizer``."""
        state: dict[str, Any] = {"scalar": optimizer.has_scalar, "vectors": optimizer.vectors, "device": device}
        full_dim = self.col0 + self.dim + 2 * (self.col0 > 0)
        if not self.levels:
            flat = FlatTable(f"t{number}", self.rows, self.dim, full_dim=full_dim, **state)
            flat.weights.copy_(torch.randn(self.rows, self.dim, generator=torch.Generator().manual_seed(number)) * 0.1)
            return flat
        identity = None
        if self.dynamic:
            generator = torch.Generator().manual_seed(number)
            identity = torch.randint(-(1 << 62), 1 << 62, (self.rows,), generator=generator).to(device)
        slots = {tier: max(self.rows // 4, 1) for tier in self.levels if tier > self.entry} if self.scarce else {}
        return TieredTable(
            f"t{number}",
            f"bags.t{number}",
            self.rows,
            self.dim,
            seed=5,
            init_scale=0.1,
            levels=self.levels,
            entry=self.entry,
            row0=self.row0,
            col0=self.col0,
            full_dim=full_dim,
            slots=slots,
            identity=identity,
            **state,
        )


@dataclass(frozen=True)
class Case:
    """Some steps over some tables. Everything that is not written here is drawn from ``seed``."""

    seed: int
    tables: tuple[TableCase, ...]
    features: tuple[int, ...]
    batch: tuple[int, ...]
    longest: int
    pooling: Pooling
    weighted: bool
    important: bool
    int32: bool
    optimizer: TableOptimizer
    gradient: float
    steps: int
    decay: float
    first_threshold: float
    maintained: bool
    device: str = "cpu"

    def build(self) -> list[Table]:
        """Fresh tables."""
        tables = [table.build(number, self.optimizer, self.device) for number, table in enumerate(self.tables)]
        for table in tables:
            if isinstance(table, TieredTable):
                table.decay, table.gain = self.decay, 8.0
                table.promote_above = [self.first_threshold * 3.0**tier for tier in Tier]
        return tables

    def bags(self, generator: torch.Generator) -> Bags:
        """The next lookup."""
        lengths = torch.randint(0, self.longest + 1, (sum(self.batch),), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids, bag = [], 0
        for number, size in zip(self.features, self.batch, strict=True):
            table, count = self.tables[number], int(offsets[bag + size] - offsets[bag])
            skewed = (
                torch.rand(count, generator=generator, dtype=torch.float64) ** 3 * (table.rows + table.dynamic)
            ).long()
            ids.append(skewed - int(table.dynamic))
            bag += size
        every = torch.cat(ids)
        weights = torch.randn(len(every), generator=generator) if self.weighted else None
        bags = Bags(
            every.to(torch.int32 if self.int32 else torch.int64),
            offsets,
            weights,
            self.features,
            self.batch,
            self.pooling,
        )
        return moved(bags, self.device)


def moved(bags: Bags, device: str) -> Bags:
    """The bags on a device."""
    weights = None if bags.weights is None else bags.weights.to(device)
    return replace(bags, ids=bags.ids.to(device), offsets=bags.offsets.to(device), weights=weights)


@st.composite
def table_cases(draw: st.DrawFn, dim: int) -> TableCase:
    """A flat or a tiered table, a shard perhaps."""
    rows = draw(st.integers(1, 120))
    col0 = draw(st.sampled_from([0, 0, 4, 64]))
    if draw(st.integers(0, 3)) == 0:
        return TableCase(rows, dim, col0=col0)
    levels = draw(st.sampled_from(LEVEL_SETS))
    entry = draw(st.sampled_from([level for level in levels if level in STORED]))
    row0 = draw(st.sampled_from([0, 0, 7, 1020, 1 << 40]))
    return TableCase(rows, dim, levels, entry, row0, col0, draw(st.booleans()), draw(st.integers(0, 3)) == 0)


@st.composite
def optimizers(draw: st.DrawFn) -> TableOptimizer:
    """Any optimizer with any decay."""
    name = draw(st.sampled_from(OPTIMIZERS))
    return TableOptimizer(
        name=name,
        lr=draw(st.sampled_from([0.02, 0.1, 1.0])),
        eps=draw(st.sampled_from([1e-8, 1e-3])),
        betas=draw(st.sampled_from([(0.9, 0.999), (0.0, 0.5)])),
        l1=draw(st.sampled_from([0.0, 0.01])) if name == "ftrl" else 0.0,
        l2=draw(st.sampled_from([0.0, 0.1])) if name == "ftrl" else 0.0,
        weight_decay=draw(st.sampled_from([0.0, 0.0, 0.01, 0.3])),
        decay=draw(st.sampled_from(["l2", "decoupled"])),
    )


@st.composite
def cases(draw: st.DrawFn, device: str = "cpu") -> Case:
    """What :func:`assert_same` runs."""
    pooling = draw(st.sampled_from(list(Pooling)))
    width = draw(st.sampled_from(DIMS))
    number = draw(st.integers(1, 3))
    dims = [width if pooling is Pooling.NONE else draw(st.sampled_from(DIMS)) for _ in range(number)]
    tables = tuple(draw(table_cases(dim)) for dim in dims)
    features = tuple(draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=4)))
    size = draw(st.integers(0, 12))
    ragged = draw(st.booleans())
    batch = tuple(draw(st.integers(0, 12)) if ragged else size for _ in features)
    return Case(
        seed=draw(st.integers(0, 1 << 30)),
        tables=tables,
        features=features,
        batch=batch,
        longest=draw(st.sampled_from([0, 1, 3, 20])),
        pooling=pooling,
        weighted=draw(st.booleans()),
        important=draw(st.booleans()),
        int32=draw(st.booleans()),
        optimizer=draw(optimizers()),
        gradient=draw(st.sampled_from([1.0, 0.01, 100.0, 0.0, 1e-20])),
        steps=draw(st.integers(1, 4)),
        decay=draw(st.sampled_from([0.01, 0.3])),
        first_threshold=draw(st.sampled_from([1e-4, 1e-2, 1.0])),
        maintained=draw(st.booleans()),
        device=device,
    )


def rules(case: Case, tables: Sequence[Table]) -> list[UpdateRule]:
    """The rule of each table at its present step."""
    found = []
    for table in tables:
        if isinstance(table, TieredTable):
            above = tuple(table.gain * threshold for threshold in table.promote_above)
            found.append(case.optimizer.rule(0.05, table.step, table.gain * table.decay, above))
        else:
            found.append(case.optimizer.rule(0.05, table.step))
    return found


def run_case(case: Case, backend: Backend) -> tuple[list[Table], list[Any]]:
    """Tables after all steps, and everything the backend returned."""
    generator = torch.Generator().manual_seed(case.seed)
    tables, seen = case.build(), []
    for _ in range(case.steps):
        seen.append(_step(case, backend, tables, generator))
        if case.maintained:
            seen.append([_maintain(case, backend, table, generator) for table in tables])
    return tables, seen


def _step(case: Case, backend: Backend, tables: list[Table], generator: torch.Generator) -> list[Any]:
    bags = case.bags(generator)
    found = backend.sort(tables, bags)
    output = backend.lookup(tables, bags, found)
    seen = [*found.unique, output, backend.lookup(tables, bags)]
    grad = (torch.randn(output.shape, generator=generator) * case.gradient).to(case.device)
    importance = torch.rand(max(case.batch), generator=generator) if case.important else None
    importance = None if importance is None else importance.to(case.device)
    if bags.weights is not None:
        seen.append(backend.weight_gradient(tables, bags, grad))
    for table in tables:
        table.advance()
    at_step = rules(case, tables)
    sums = backend.row_sums(tables, found, grad, at_step)
    given = [total * 1.5 for total in sums] if case.optimizer.has_scalar and case.seed % 2 else None
    return [*seen, *sums, backend.update(tables, found, grad, at_step, importance, given)]


def _maintain(case: Case, backend: Backend, table: Table, generator: torch.Generator) -> Any:
    rows = torch.randperm(table.rows, generator=generator)[: table.rows // 3].to(case.device)
    first, count = (torch.randint(0, table.rows + 1, (2,), generator=generator)).tolist()
    if isinstance(table, FlatTable):
        return backend.read(table, rows)
    keep_from = [table.gain * threshold * 2 for threshold in table.promote_above]
    done = [backend.histogram(table), backend.demote(table, first, count, keep_from)]
    choices = torch.tensor([0, table.levels[0], table.entry], device=case.device)
    picked = torch.randint(0, 3, (len(rows),), generator=generator).to(case.device)
    values = torch.randn(len(rows), table.dim, generator=generator).to(case.device)
    backend.write(table, rows, values, choices[picked])
    for tier in table.stored_levels:
        backend.compact(table, tier)
    return [*done, backend.read(table, rows)]


def assert_same(case: Case, backend: Backend) -> None:
    """The backend does what the reference does on CPU, to the last bit."""
    expected_tables, expected = run_case(replace(case, device="cpu"), Reference())
    tables, seen = run_case(case, backend)
    _assert_equal(seen, expected, backend.name)
    for ours, theirs in zip(tables, expected_tables, strict=True):
        assert_same_tables(ours, theirs)


def _assert_equal(seen: Any, expected: Any, where: str) -> None:
    if isinstance(expected, list):
        assert len(seen) == len(expected), where
        for number, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
            _assert_equal(ours, theirs, f"{where}[{number}]")
    elif isinstance(expected, Tensor):
        assert ours_like(seen, expected), f"{where}: {_difference(seen, expected)}"
    else:
        assert isinstance(expected, UpdateStats | int)
        assert seen == expected, where


def ours_like(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every number, on whatever devices."""
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.cpu())


def assert_same_tables(ours: Table, theirs: Table) -> None:
    """Two tables hold the same in every row: weights, state, and for tiered ones tier, scale and priority."""
    for label, mine, other in zip(_LABELS, contents(ours), contents(theirs), strict=True):
        assert ours_like(mine, other), f"{label} of '{ours.name}' differ: {_difference(mine, other)}"
    assert ours.step == theirs.step
    for table in (ours, theirs):
        if isinstance(table, TieredTable):
            assert_sound(table)


def _difference(mine: Tensor, other: Tensor) -> str:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return f"{mine.dtype}{list(mine.shape)} is not {other.dtype}{list(other.shape)}"
    mine, other = mine.cpu(), other.cpu()
    places = (mine != other).nonzero()[:5]
    return ", ".join(f"{place}: {mine[tuple(place)]} is not {other[tuple(place)]}" for place in places.tolist())


_LABELS = ("weights", "scalars", "vectors", "tiers", "scales", "priorities")


def contents(table: Table) -> tuple[Tensor, ...]:
    """[rows, ...] weights, scalars, vectors, tiers, scales (0 in tiers without one), priorities."""
    if isinstance(table, FlatTable):
        vectors = torch.cat([table.weights[:, :0], *table.vectors], 1)
        nothing = torch.zeros(table.rows, device=table.device)
        return table.weights, table.scalar, vectors, nothing, nothing, nothing
    found = read_rows(table, torch.arange(table.rows, device=table.device), with_state=True)
    scaled = torch.isin(found.tier, torch.tensor(list(LEVELS), device=table.device))
    vectors = torch.cat([found.x[:, :0], *found.vectors], 1)
    scale = torch.where(scaled, found.scale, 0.0)
    return found.x, table.stat[:, 0], vectors, found.tier, scale, table.stat[:, 1]


def assert_sound(table: TieredTable) -> None:
    """Every row with a record has one slot, and every other slot below the high mark is free."""
    tiers = table.tier_of()
    assert set(tiers.tolist()) <= {Tier.NONE, *table.levels}
    for tier in table.stored_levels:
        high, free = table.count[tier].tolist()
        used = (table.desc[tiers == tier, 0].long() & SLOT_MASK).tolist()
        spare = table.free[tier][:free].tolist()
        assert sorted(used + spare) == list(range(high)), tier
        assert high <= table.slots[tier]
        assert table.live(tier) == len(used)
