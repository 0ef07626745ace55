"""Trains the sharded twin on one rank; what the equality tests run on every rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from tests.multi.twin import BATCH, DENSE_LR, PATHS, Net, Sample, samples
from thresher.embeddings.optimizers import TableOptimizer
from thresher.sharding.cuts import SEQUENCE_TYPES
from thresher.sharding.model import ShardedModel, shard
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan

STEPS = 20
SEED = 3


@dataclass(frozen=True)
class Case:
    """One training: all pooled tables have ``kind``; sequence tables too where there is such a type for them.

    ``mixed`` gives the tables of one collection different types.
    """

    kind: str
    optimizer: str
    column_state: str = "exact"

    @property
    def table_optimizer(self) -> TableOptimizer:
        # Adam divides what is almost 0 by what is almost 0.
        eps = 0.01 if "adam" in self.optimizer else 1e-8
        return TableOptimizer(name=self.optimizer, lr=0.1, eps=eps, column_state=self.column_state)


@dataclass(frozen=True)
class Outcome:
    """What a rank saw: losses over all ranks, its rectangles of each table (row0, col0, values), dense weights."""

    plan: Plan
    losses: list[float]
    parts: dict[str, list[tuple[int, int, Tensor]]]
    dense: dict[str, Tensor]


MIXED = {"norm": "row_wise", "shared": "table_wise", "mean": "grid_shard", "item": "row_wise", "side": "table_wise"}


def plan_of(case: Case, world: int, local_world: int) -> Plan:
    sequence = case.kind if case.kind in SEQUENCE_TYPES else "table_wise"
    mixed = case.kind == "mixed"
    return make_plan(
        Net(),
        world=world,
        local_world=local_world,
        device="cpu",
        optimizer=case.table_optimizer,
        default="column_wise" if mixed else case.kind,
        tables=MIXED if mixed else {"item": sequence, "side": sequence},
        memory_bytes=1 << 30,
    )


def train_all(rank: int, world: int, local_world: int, cases: list[Case]) -> list[Outcome]:
    """Every case, one after the other, in one process."""
    return [train(rank, world, local_world, case) for case in cases]


def train(rank: int, world: int, local_world: int, case: Case) -> Outcome:
    torch.manual_seed(rank)
    plan = plan_of(case, world, local_world)
    model = shard(Net(), plan, device=torch.device("cpu"), optimizer=case.table_optimizer, seed=SEED)
    dense = torch.optim.SGD(model.dense_parameters().values(), lr=DENSE_LR)
    losses = [_step(model, dense, sample, rank, world) for sample in samples(STEPS)]
    weights = {name: parameter.detach().clone() for name, parameter in model.dense_parameters().items()}
    return Outcome(plan, losses, local_parts(model), weights)


def _step(model: ShardedModel, dense: torch.optim.Optimizer, sample: Sample, rank: int, world: int) -> float:
    kjt, labels = sample.part(rank, world)
    loss = F.binary_cross_entropy_with_logits(model.wrapped(kjt), labels, reduction="sum") / (BATCH // world)
    dense.zero_grad()
    loss.backward()
    model.step_tables()
    dense.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / world


def local_parts(model: ShardedModel) -> dict[str, list[tuple[int, int, Tensor]]]:
    """Copies of this rank's rectangles by table path."""
    state = model.wrapped.state_dict()
    found = {}
    for table, path in PATHS.items():
        (weight,) = (value for key, value in state.items() if key.endswith(f".{table}.weight"))
        if isinstance(weight, ShardedTensor):
            found[path] = [(*p.metadata.shard_offsets, p.tensor.clone()) for p in weight.local_shards()]
        else:
            found[path] = [(0, 0, weight.detach().clone())]
    return found


def assemble(outcomes: list[Outcome], path: str, rows: int, dim: int) -> Tensor:
    """The whole table from all ranks' rectangles; replicas must agree bit for bit, every cell must be covered."""
    whole = torch.full((rows, dim), float("nan"))
    for outcome in outcomes:
        for row0, col0, values in outcome.parts[path]:
            window = whole[row0 : row0 + values.shape[0], col0 : col0 + values.shape[1]]
            assert window.isnan().all() or torch.equal(window, values)
            window.copy_(values)
    assert not whole.isnan().any()
    return whole
