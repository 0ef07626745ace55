"""Trains a tiny model on a mesh of pipelines, and in one process that knows of none."""

from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch

from tests.pipeline.runtime.tiny import SEED, Reference, Tiny, padded
from thresher.pipeline.parallel.clip import clip_gradients
from thresher.pipeline.parallel.dense import DenseState, Replicated
from thresher.pipeline.parallel.mesh import make_mesh
from thresher.pipeline.parallel.sharded import ShardedLayers
from thresher.pipeline.parallel.zero import ZeroStage1
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import RankParts, build_parts
from thresher.pipeline.schedule.build import build_schedule

CPU = torch.device("cpu")
LIMIT = timedelta(seconds=60)
STEPS = 3
WAYS = {
    "replicated": lambda parts, mesh: Replicated(parts, mesh, bucket_bytes=4096),
    "sharded": ShardedLayers,
    "zero": ZeroStage1,
}


@dataclass(frozen=True)
class Setting:
    """A model on pipelines of ``stages`` ranks with ``chunks`` stages each; microbatches are per replica."""

    way: str
    stages: int
    chunks: int
    build: Tiny = field(default_factory=lambda: Tiny(layers=4))
    split: bool = True
    max_norm: float = 0.05
    split_backward: bool = False
    microbatches: int = 2
    slices: int = 4


def make_optimizer(parameters):
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.1)


def data(setting: Setting, replicas: int, step: int):
    """Microbatches of all replicas: replicas get them in turn, ``setting.microbatches`` each."""
    given = padded(setting.microbatches * replicas, setting.slices)
    narrow = [replace(m, weights=m.weights.to(setting.build.dtype) * (1 + step * 0.1 * k)) for k, m in enumerate(given)]
    return narrow, sum(float(m.weights.sum()) for m in narrow)


def parts_of(setting: Setting, rank: int):
    split = {"split_embedding": setting.split, "split_head": setting.split}
    sizes = (setting.stages, setting.chunks, setting.microbatches, setting.slices)
    schedule = build_schedule(*sizes, **split, split_backward=setting.split_backward)
    return schedule, build_parts(setting.build, schedule.shape, rank, CPU)


@dataclass
class Run:
    """One process of a run."""

    setting: Setting
    dense: DenseState
    optimizer: object
    runtime: PipelineRuntime
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def step(self, number: int) -> None:
        mesh = self.dense.mesh
        given, weight = data(self.setting, mesh.replicas, number)
        own = given[mesh.replica * self.setting.microbatches :][: self.setting.microbatches]
        outcome = self.runtime.step(own, total_weight=weight, step=number, chunk_done=self.dense.chunk_done)
        self.dense.finish()
        self.losses.append(float(outcome.loss))
        self.norms.append(clip_gradients(self.dense.gradients(), mesh, self.setting.max_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluated(self) -> float:
        """The loss on microbatches that are the same for all replicas."""
        return float(self.runtime.evaluate(data(self.setting, 1, 0)[0]).loss)


def begin(setting: Setting, make=make_optimizer) -> Run:
    """Before the first step; replicas differ until dense state makes them alike."""
    mesh = make_mesh(setting.stages, "cpu", LIMIT)
    schedule, parts = parts_of(setting, mesh.rank)
    if mesh.replica:
        perturb(parts)
    groups = make_groups(schedule, mesh.pipelines, LIMIT) if setting.stages > 1 else None
    dense = WAYS[setting.way](parts, mesh)
    optimizer = dense.optimizer(make)
    runtime = PipelineRuntime(schedule, parts, groups, RuntimeOptions(timeout=LIMIT, seed=SEED))
    return Run(setting, dense, optimizer, runtime)


def train(setting: Setting, make=make_optimizer) -> Run:
    """Several steps on all processes, and evaluations between them."""
    run = begin(setting, make)
    for step in range(STEPS):
        run.step(step)
        run.evaluated()
    return run


def perturb(parts: RankParts) -> None:
    """Replicas that differ at the start are to become alike."""
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(1)


def reference(setting: Setting, replicas: int):
    """Weights by name, losses and norms of one process."""
    model = Reference(setting.build)
    optimizer = make_optimizer(model.parameters())
    losses, norms = [], []
    for step in range(STEPS):
        given, _ = data(setting, replicas, step)
        optimizer.zero_grad()
        loss = model.loss(given, step)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), setting.max_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
    renamed = {"embedding": "embedding.weight", "head": "head.weight"}
    return {renamed.get(name, name): p.detach() for name, p in model.named_parameters()}, losses, norms
