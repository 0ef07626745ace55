"""The twin model scored and pruned, sharded or not; what the tests of fields run on every rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.multi.sharded_twin import SEED, Case, local_parts, plan_of
from tests.multi.twin import BATCH, DENSE_LR, PATHS, Net, samples
from thresher.embeddings.fields.field import Field, find_fields
from thresher.embeddings.fields.pruning import FieldPruner
from thresher.embeddings.fields.scorer import FieldScorer
from thresher.embeddings.fields.scores import FieldScores
from thresher.embeddings.fields.tap import attach
from thresher.embeddings.init import init_tables
from thresher.embeddings.tables import find_tables
from thresher.sharding.model import ShardedModel, shard

SCORED_STEPS, PRUNED_STEPS = 20, 6
DROPPED = ("bag_a", "bag_m", "bag_w", "seq_b", "seq_c")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Seen:
    """What a training gave: scores before anything was dropped, losses over all ranks, tables around the drop."""

    scores: FieldScores
    mean: Tensor
    losses: list[float]
    before: dict[str, list[tuple[int, int, Tensor]]]
    after: dict[str, list[tuple[int, int, Tensor]]]


def weights_of(step: int) -> Tensor:
    """[BATCH] 0, 1 and 2, one sample in four counting nowhere."""
    return torch.arange(BATCH).add(step).remainder(4).clamp(max=2).float()


@dataclass
class Run:
    """Scores for a while, drops, and goes on."""

    model: nn.Module
    fields: tuple[Field, ...]
    collections: dict[str, nn.Module]
    rank: int
    world: int

    def __post_init__(self) -> None:
        self.pruner = FieldPruner(self.fields, CPU)
        self.scorer = FieldScorer(self.fields, CPU)
        attach(self.collections, self.pruner, self.scorer)

    def loss(self, step: int) -> Tensor:
        kjt, labels = samples(SCORED_STEPS + PRUNED_STEPS)[step].part(self.rank, self.world)
        share = BATCH // self.world
        weight = weights_of(step)[self.rank * share : (self.rank + 1) * share]
        self.scorer.begin(weight)
        losses = F.binary_cross_entropy_with_logits(self.model(kjt), labels, reduction="none")
        return (losses * weight).sum() / share

    def drop(self) -> None:
        numbers = [number for number, field in enumerate(self.fields) if field.name in DROPPED]
        self.pruner.drop(numbers, self.scorer.mean(), SCORED_STEPS)


def sharded(rank: int, world: int, kind: str) -> Seen:
    case = Case(kind, "sgd")
    net = Net()
    fields = find_fields(find_tables(net))
    model = shard(net, plan_of(case, world, world), device=CPU, optimizer=case.table_optimizer, seed=SEED)
    modules = {path: model.wrapped.module.get_submodule(path) for path in {field.module for field in fields}}
    run = Run(model.wrapped, fields, modules, rank, world)
    dense = torch.optim.SGD(model.dense_parameters().values(), lr=DENSE_LR)
    losses = [_step(run, model, dense, step) for step in range(SCORED_STEPS)]
    scores, mean, before = run.scorer.read(), run.scorer.mean(), local_parts(model)
    run.drop()
    losses += [_step(run, model, dense, SCORED_STEPS + step) for step in range(PRUNED_STEPS)]
    return Seen(scores, mean, losses, before, local_parts(model))


def sharded_all(rank: int, world: int, kinds: list[str]) -> list[Seen]:
    return [sharded(rank, world, kind) for kind in kinds]


def _step(run: Run, model: ShardedModel, dense: torch.optim.Optimizer, step: int) -> float:
    loss = run.loss(step)
    dense.zero_grad()
    loss.backward()
    model.step_tables()
    dense.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / run.world


def unsharded() -> Seen:
    """The same with TorchRec's own collections and torch's SGD, in this process."""
    net = Net("cpu")
    init_tables(net, SEED)
    fields = find_fields(find_tables(net))
    modules = {path: net.get_submodule(path) for path in {field.module for field in fields}}
    run = Run(net, fields, modules, 0, 1)
    tables = [p for module in modules.values() for p in module.parameters()]
    rates = [{"params": tables, "lr": Case("table_wise", "sgd").table_optimizer.lr}]
    optimizer = torch.optim.SGD([*rates, {"params": list(net.top.parameters()), "lr": DENSE_LR}])
    losses: list[float] = []
    scores, mean, before = None, None, {}
    for step in range(SCORED_STEPS + PRUNED_STEPS):
        if step == SCORED_STEPS:
            scores, mean, before = run.scorer.read(), run.scorer.mean(), whole(net)
            run.drop()
        optimizer.zero_grad()
        loss = run.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return Seen(scores, mean, losses, before, whole(net))


def whole(net: Net) -> dict[str, list[tuple[int, int, Tensor]]]:
    """Copies of all tables by path."""
    named = dict(net.named_parameters())
    found = {}
    for table, path in PATHS.items():
        (weight,) = (p for name, p in named.items() if name.endswith(f".{table}.weight"))
        found[path] = [(0, 0, weight.detach().clone())]
    return found
