"""Builds the parts of a run whose model is cut into stages: each rank makes what it holds, and nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from thresher.data.dataset import Dataset
from thresher.embeddings.policy.ledger import Ledger
from thresher.pipeline.parallel.dense import DenseState, Replicated, trained
from thresher.pipeline.parallel.mesh import PipelineMesh, make_mesh
from thresher.pipeline.parallel.sharded import ShardedLayers
from thresher.pipeline.parallel.state import ModelState, OptimizerState
from thresher.pipeline.parallel.zero import ZeroStage1
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.recompute import require_recomputable
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import RankParts, build_parts
from thresher.sharding.plan import Plan
from thresher.trainer.checkpoint import State
from thresher.trainer.config import RunConfig
from thresher.trainer.folder import RunFolder
from thresher.trainer.loop import step_seed
from thresher.trainer.model import SequenceConfig, Sequencer
from thresher.trainer.optim import optimizer_of
from thresher.trainer.parts import RunParts, Share
from thresher.trainer.pipelined.cut import Cutter
from thresher.trainer.pipelined.evaluate import PipelinedEvaluator
from thresher.trainer.pipelined.schedule import cutter_of, require_plain, schedule_of, slice_bounds
from thresher.trainer.pipelined.step import PipelinedStepper
from thresher.trainer.step import require_finite_weights
from thresher.trainer.world import World

WAYS: Mapping[str, Callable[[RankParts, PipelineMesh], DenseState]] = MappingProxyType(
    {"replicated": Replicated, "sharded": ShardedLayers, "zero1": ZeroStage1}
)
"""By ``pipeline.dense``, how replicas hold parameters."""


@dataclass(frozen=True)
class PipelinedParts(RunParts):
    """A run whose processes are pipelines of stages.

    Attributes:
        runtime: runs this rank's stages.
        held: their parameters on all replicas.
        cutter: makes microbatches of samples.
        numbers: in the parameters of the whole model.
    """

    runtime: PipelineRuntime
    held: DenseState
    sequencer: Sequencer
    cutter: Cutter
    numbers: int

    @property
    def plan(self) -> Plan:
        """No tables."""
        return Plan(world=self.world.world, local_world=self.world.local_world, tables=())

    @property
    def share(self) -> Share:
        """All ranks of a pipeline read the same."""
        mesh = self.held.mesh
        return Share(mesh.replica, mesh.replicas, multiple=self.config.pipeline.microbatches)

    @property
    def dense_parameters(self) -> int:
        """See :class:`RunParts`."""
        return self.numbers

    def state(self) -> State:
        """Weights and optimizer state, by the names of a run without a pipeline."""
        return {**self.weights(), "dense_optimizer": OptimizerState(self.held)}

    def weights(self) -> State:
        """See :class:`RunParts`."""
        return {"model": ModelState(self.held)}

    def stepper(self) -> PipelinedStepper:
        """Takes the steps."""
        train = self.config.train
        samples, clip = train.batch_size, train.clip_norm
        return PipelinedStepper(self.runtime, self.held, self.dense, self.sequencer, self.cutter, samples, clip)

    def evaluator(self) -> PipelinedEvaluator:
        """Measures the model on a split."""
        likelihood, at, mesh = self.config.model.is_likelihood, self.config.eval.at, self.held.mesh
        return PipelinedEvaluator(self.runtime, mesh, self.sequencer, self.cutter, likelihood, at, self.world)

    def require_finite(self, step: int) -> None:
        """See :class:`RunParts`."""
        require_finite_weights(self.held.parts, step)

    def set_table_lr(self, lr: float) -> None:
        """There are no tables."""

    @property
    def has_tiers(self) -> bool:
        """There are no tables."""
        return False

    def ledger(self) -> Ledger:
        """There are no tables."""
        raise AssertionError("a pipeline has no tables")

    def watched(self) -> tuple[str, int]:
        """No output is."""
        return "", 0


def assemble_pipelined(config: RunConfig[Any], world: World, dataset: Dataset) -> PipelinedParts:
    """Builds this rank's stages and the groups it talks in. Collective.

    Raises:
        ThresherError: the model does not fit the data, or the pipeline does not fit the model or the ranks.
    """
    require_plain(config)
    model, pipeline = config.model, config.pipeline
    assert isinstance(model, SequenceConfig)
    trunk, sequencer = model.trunk(dataset.schema, config.seed), model.sequencer(dataset.schema)
    attention = model.attention_share(sequencer.length)
    rows = config.train.batch_size // pipeline.parts(world.world)
    bounds = slice_bounds(pipeline, sequencer.length, rows, attention)
    schedule = schedule_of(pipeline, trunk, bounds, attention)
    mesh = make_mesh(pipeline.stages, world.device.type, pipeline.timeout)
    parts = build_parts(trunk, schedule.shape, mesh.rank, world.device)
    for stage in range(pipeline.chunks):
        for layer in parts.stage(stage).layers.values():
            require_recomputable(layer, pipeline.recompute)
    held = WAYS[pipeline.dense](parts, mesh)
    optimizer = held.optimizer(lambda parameters: optimizer_of(parameters, config.optim.dense))
    options = RuntimeOptions(
        timeout=pipeline.timeout,
        recompute=pipeline.recompute,
        autocast=torch.bfloat16 if config.train.precision == "bf16" else None,
        offload=pipeline.offload,
        seed=step_seed(config.seed, 0, mesh.replica),
    )
    cutter = cutter_of(pipeline, bounds, sequencer.length, attention)
    groups = make_groups(schedule, mesh.pipelines, pipeline.timeout) if pipeline.stages > 1 else None
    runtime = PipelineRuntime(schedule, parts, groups, options)
    folder, numbers = RunFolder(config.folder), _numbers(held)
    return PipelinedParts(config, world, folder, dataset, optimizer, None, runtime, held, sequencer, cutter, numbers)


def _numbers(held: DenseState) -> int:
    """Collective: numbers in the parameters of all stages."""
    own = torch.tensor(sum(parameter.numel() for parameter in trained(held.parts)))
    total = own.to(next(held.parts.parameters()).device)
    dist.all_reduce(total, group=held.mesh.pipeline)
    return int(total)
