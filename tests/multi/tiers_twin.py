"""A model with tiers twice: sharded, and as groups of whole tables that know nothing of TorchRec.

Gradients of both are small multiples of powers of two and do not depend on the rows, so sums are exact in any order:
whatever ranks hold a table, its rows must come out the same to the last bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from thresher.embeddings.group import StepContext, TableGroup
from thresher.embeddings.init import fill, init_scale
from thresher.embeddings.kernels.backend import Table, pick_backend
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TableTiers, TierConfig
from thresher.embeddings.policy.controller import TierController
from thresher.embeddings.policy.ledger import Moves
from thresher.embeddings.policy.plan import tier_plan
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.tables import TableInfo, find_tables
from thresher.sharding.held import TableShard
from thresher.sharding.model import ShardedModel, shard
from thresher.sharding.planner import make_plan

SEED = 5
BATCH, STEPS, DIM = 16, 24, 32
ROWS = {"shared": 203, "alone": 401, "plain": 60, "weighted": 151, "item": 120}
POOLED = {"shared": ["a", "b"], "alone": ["c"], "plain": ["d"]}
KEYS = ["a", "b", "c", "d", "w", "s", "t"]
TABLE_OF = {"a": "shared", "b": "shared", "c": "alone", "d": "plain", "w": "weighted", "s": "item", "t": "item"}
COLLECTIONS = (("bags", ["a", "b", "c", "d"]), ("heavy", ["w"]), ("single", ["s", "t"]))
"""Collections and the keys that their tables read, in the order of the tables."""


def tiers(budget: str) -> TierConfig:
    """Thresholds chosen again and again; ``plain`` stays fp32 beside the others."""
    levels = ("fp32", "fp16", "int8", "int4")
    return TierConfig(
        budget=budget,
        levels=levels,
        decay=0.1,
        spread=2.0,
        rebalance_every=6,
        sweep_every=3,
        flat_below_bytes=0,
        protect=("plain",),
        tables={"weighted": TableTiers(levels=(*levels, "dropped"))},
    )


class Net(nn.Module):
    """Pooled tables with and without weights, and one of single ids."""

    def __init__(self) -> None:
        super().__init__()
        meta = torch.device("meta")
        bags = [_bag(name, keys) for name, keys in POOLED.items()]
        self.bags = EmbeddingBagCollection(bags, device=meta)
        self.heavy = EmbeddingBagCollection([_bag("weighted", ["w"])], is_weighted=True, device=meta)
        item = EmbeddingConfig(name="item", num_embeddings=ROWS["item"], embedding_dim=DIM, feature_names=["s", "t"])
        self.single = EmbeddingCollection([item], device=meta)

    def forward(self, kjt: KeyedJaggedTensor) -> dict[str, Tensor]:
        """By key [B, D] pooled, or [ids, D]."""
        pooled = {**self.bags(kjt).to_dict(), **self.heavy(kjt).to_dict()}
        return pooled | {key: found.values() for key, found in self.single(kjt).items()}


def _bag(name: str, keys: list[str]) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=ROWS[name], embedding_dim=DIM, feature_names=keys, pooling=PoolingType.SUM
    )


@dataclass(frozen=True)
class Sample:
    """A global batch: ids and weights by key, one list a sample; importance and gradient factors [BATCH]."""

    ids: dict[str, list[list[int]]]
    weights: dict[str, list[list[float]]]
    importance: Tensor
    factors: Tensor

    def part(self, rows: slice) -> KeyedJaggedTensor:
        """The ids of some samples."""
        bags = [bag for key in KEYS for bag in self.ids[key][rows]]
        weights = [w for key in KEYS for bag in self.weights[key][rows] for w in bag]
        return KeyedJaggedTensor(
            KEYS,
            torch.tensor([row for bag in bags for row in bag], dtype=torch.int64),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor([len(bag) for bag in bags]),
        )


def samples(steps: int) -> list[Sample]:
    """Skewed ids, many twice, empty bags; step 3 is empty in its first half, step 5 everywhere."""
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    found = []
    for step in range(steps):
        ids: dict[str, list[list[int]]] = {}
        weights: dict[str, list[list[float]]] = {}
        for key in KEYS:
            counts = draw(0, 5, BATCH)
            counts[: {3: BATCH // 2, 5: BATCH}.get(step, 0)] = 0
            rows = ROWS[TABLE_OF[key]]
            ids[key] = [(torch.rand(int(n), generator=generator) ** 3 * rows).long().tolist() for n in counts]
            weights[key] = [(draw(1, 5, int(n)) / 4).tolist() for n in counts]
        found.append(Sample(ids, weights, 1.0 + 3.0 * draw(0, 2, BATCH), (draw(-2, 3, BATCH) / 4)))
    return found


def loss(outputs: dict[str, Tensor], kjt: KeyedJaggedTensor, factors: Tensor) -> Tensor:
    """A sum over samples whose gradient at a vector is its sample's factor times a pattern."""
    pattern = torch.tensor([1.0, -0.5, 0.25, 0.5, -1.0, 2.0, -0.25, 0.125]).repeat(DIM // 8)
    total = torch.zeros(())
    for number, key in enumerate(KEYS):
        of_bags = factors * (1 + number % 3)
        each = of_bags if key not in ("s", "t") else torch.repeat_interleave(of_bags, kjt[key].lengths())
        total = total + (outputs[key] * (each.unsqueeze(1) * pattern)).sum()
    return total


@dataclass(frozen=True)
class Part:
    """A rectangle of a table after training: values, and of each row tier, optimizer scalar and priority."""

    row0: int
    col0: int
    values: Tensor
    tier: Tensor
    stat: Tensor


def part_of(table: Table, row0: int, col0: int) -> Part:
    values = pick_backend(table.device).read(table, torch.arange(table.rows))
    if isinstance(table, TieredTable):
        return Part(row0, col0, values, table.tier_of(), table.stat.clone())
    scalar = table.scalar if table.scalar.numel() else torch.zeros(table.rows)
    return Part(row0, col0, values, torch.full((table.rows,), 5), torch.stack([scalar, scalar * 0], dim=1))


@dataclass(frozen=True)
class Outcome:
    """What a rank ends with: its rectangles by path, and how many rows moved."""

    parts: dict[str, list[Part]]
    moves: Moves


@dataclass(frozen=True)
class Case:
    """One training: sharding type of pooled tables and of the one of single ids, optimizer, budget."""

    kind: str
    single: str
    optimizer: str = "rowwise_adagrad"
    budget: str = "60%"


def train_all(rank: int, world: int, local_world: int, todo: list[Case]) -> list[Outcome]:
    """Every case in one process of each rank."""
    return [train(rank, world, local_world, case) for case in todo]


def sharded(world: int, local_world: int, case: Case) -> ShardedModel:
    optimizer = TableOptimizer(name=case.optimizer, lr=0.25)
    plan = make_plan(
        Net(),
        world=world,
        local_world=local_world,
        device="cpu",
        optimizer=optimizer,
        default=case.kind,
        tables={"item": case.single},
        memory_bytes=1 << 30,
        tiers=tiers(case.budget),
    )
    return shard(Net(), plan, device=torch.device("cpu"), optimizer=optimizer, seed=SEED, tiers=tiers(case.budget))


def train(rank: int, world: int, local_world: int, case: Case) -> Outcome:
    model = sharded(world, local_world, case)
    size = BATCH // world
    own = slice(rank * size, (rank + 1) * size)
    for sample in samples(STEPS):
        step(model, sample, own, world)
    return outcome(model)


def step(model: ShardedModel, sample: Sample, own: slice, world: int) -> None:
    kjt = sample.part(own)
    model.observe(sample.importance[own])
    # TorchRec divides gradients by the number of ranks.
    (loss(model.wrapped(kjt), kjt, sample.factors[own]) * world).backward()
    model.step_tables()


def outcome(model: ShardedModel) -> Outcome:
    parts: dict[str, list[Part]] = {}
    for table in model.tables():
        parts.setdefault(table.path, []).append(_shard_part(table))
    assert model.tiers is not None
    return Outcome(parts, model.tiers.moves)


def _shard_part(table: TableShard) -> Part:
    return part_of(table.storage, table.row0, table.col0)


class Whole:
    """The twin without TorchRec: every table whole, a group a collection."""

    def __init__(self, optimizer: str, budget: str) -> None:
        self._settings, config = TableOptimizer(name=optimizer, lr=0.25), tiers(budget)
        infos = find_tables(Net())
        plan = tier_plan(infos, config, self._settings)
        self.context = StepContext()
        self.tables = {info.path: self._table(info, plan.by_path[info.path].tiered, plan) for info in infos}
        backend = pick_backend(torch.device("cpu"))
        self.groups = []
        for module, keys in COLLECTIONS:
            names = list(dict.fromkeys(TABLE_OF[key] for key in keys))
            features = [names.index(TABLE_OF[key]) for key in keys]
            group = [self.tables[f"{module}.{name}"] for name in names]
            pooling = Pooling.NONE if module == "single" else Pooling.SUM
            self.groups.append(TableGroup(group, features, pooling, self._settings, backend, self.context))
        tiered = [table for table in self.tables.values() if isinstance(table, TieredTable)]
        flat = sum(table.nbytes for table in self.tables.values() if isinstance(table, FlatTable))
        self.controller = TierController(tiered, plan, config, backend, flat_bytes=flat)

    def train(self) -> "Whole":
        for sample in samples(STEPS):
            kjt = sample.part(slice(0, BATCH))
            self.context.importance = sample.importance
            loss(self._outputs(kjt), kjt, sample.factors).backward()
            self.controller.after_step([group.stats for group in self.groups])
        return self

    def parts(self) -> dict[str, Part]:
        return {path: part_of(table, 0, 0) for path, table in self.tables.items()}

    def _outputs(self, kjt: KeyedJaggedTensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for group, (module, keys) in zip(self.groups, COLLECTIONS, strict=True):
            own = kjt.permute([KEYS.index(key) for key in keys])
            vectors = group(own.values(), own.offsets(), own.weights() if module == "heavy" else None)
            if module == "single":
                counts = [int(kjt[key].lengths().sum()) for key in keys]
                found |= dict(zip(keys, vectors.split(counts), strict=True))
            else:
                found |= dict(zip(keys, vectors.split(DIM, dim=1), strict=True))
        return found

    def _table(self, info: TableInfo, tiered: bool, plan: object) -> Table:
        scale, settings = init_scale(info.rows), self._settings
        scalar, vectors = settings.has_scalar, settings.vectors
        if not tiered:
            flat = FlatTable(info.table, info.rows, info.dim, scalar=scalar, vectors=vectors)
            fill(flat.weights, SEED, info.path, info.dim, scale)
            return flat
        found = plan.by_path[info.path]
        return TieredTable(
            info.table,
            info.path,
            info.rows,
            info.dim,
            seed=SEED,
            init_scale=scale,
            scalar=scalar,
            vectors=vectors,
            levels=found.levels,
            entry=found.entry,
        )


def assembled(ranks: list[Outcome], path: str) -> Part:
    """The whole table from all ranks' rectangles: every cell covered once, column shards of a row agree."""
    parts = [part for outcome in ranks for part in outcome.parts.get(path, [])]
    rows = max(part.row0 + len(part.values) for part in parts)
    cols = max(part.col0 + part.values.shape[1] for part in parts)
    values, tier, stat = torch.full((rows, cols), float("nan")), torch.full((rows,), -1), torch.full((rows, 2), -1.0)
    for part in sorted(parts, key=lambda p: (p.row0, p.col0)):
        own = slice(part.row0, part.row0 + len(part.values))
        window = values[own, part.col0 : part.col0 + part.values.shape[1]]
        assert window.isnan().all()
        window.copy_(part.values)
        if part.col0 > 0:
            assert torch.equal(tier[own], part.tier)
            assert torch.equal(stat[own], part.stat)
        tier[own], stat[own] = part.tier, part.stat
    assert not values.isnan().any()
    return Part(0, 0, values, tier, stat)
