"""``thresher plan``: what a run would be, from the configuration and the data set's manifest alone."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from thresher.data.dataset import Dataset
from thresher.embeddings.tables import find_tables
from thresher.launch.group import check_batches, check_device
from thresher.launch.preparing import dataset_for
from thresher.pipeline.runtime.stage import layer_ranges
from thresher.sharding.check import check_plan
from thresher.sharding.show import plan_table
from thresher.trainer.assemble import dynamic_tables, measured, plan_of, total_steps
from thresher.trainer.config import RunConfig, load_config
from thresher.trainer.pipelined.schedule import require_plain, schedule_of, slice_bounds
from thresher.zoo.registry import RunConfig as AnyRunConfig


def show_plan(file: Path, overrides: tuple[str, ...]) -> None:
    """Prints the sharding plan and the size of the run. Makes the data set if need be, trains nothing.

    Raises:
        ThresherError: whatever would keep the run from starting.
    """
    config: RunConfig[Any] = load_config(AnyRunConfig, file, overrides)
    ranks = config.launch.processes
    check_batches(config.train, ranks, config.pipeline)
    device = check_device(config.launch, ranks)
    dataset = dataset_for(config.data.path, config.data.recipe, config.data.options, str(file))
    if config.pipeline.is_on:
        line = pipeline_line(config, dataset)
        Console().print(line, soft_wrap=True)
        return
    model = config.model.build(dataset.schema, torch.device("meta"))
    raw = dynamic_tables(config, dataset.schema)
    plan = plan_of(config, model, ranks, ranks, device, measured(config, dataset, model), raw)
    check_plan(plan, find_tables(model), ranks, ranks, config.sharding.plan or "plan")
    console = Console()
    console.print(plan_table(plan))
    for note in plan.notes:
        console.print(note, soft_wrap=True)
    tables = {id(p) for info in find_tables(model) for p in model.get_submodule(info.module).parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    console.print(run_line(config, dataset, dense), soft_wrap=True)


def pipeline_line(config: RunConfig[Any], dataset: Dataset) -> str:
    """Stages and slices of a run in one line.

    Raises:
        ThresherError: the model or its sequences cannot be cut like that.
    """
    require_plain(config)
    pipeline, model = config.pipeline, config.model
    length, trunk = model.sequencer(dataset.schema).length, model.trunk(dataset.schema, config.seed)
    share = model.attention_share(length)
    rows = config.train.batch_size // pipeline.parts(config.launch.processes)
    bounds = slice_bounds(pipeline, length, rows, share)
    schedule = schedule_of(pipeline, trunk, bounds, share)
    layers = [len(each) for each in layer_ranges(trunk.layers, pipeline.stages * pipeline.chunks)]
    at_most = " at most" if pipeline.packing == "packed" else ""
    slices = [stop - start for start, stop in pairwise(bounds)]
    return (
        f"{config.name}: {config.launch.processes // pipeline.stages} pipeline(s) of {pipeline.stages} ranks x "
        f"{pipeline.chunks} chunks, layers by stage {layers}; {pipeline.microbatches} microbatches of slices of "
        f"{slices} tokens{at_most}; operations by rank {[len(ops) for ops in schedule.ranks]}; "
        f"{total_steps(config, dataset.split(config.data.train).rows):,} steps of {config.train.batch_size:,} samples"
    )


def run_line(config: RunConfig[Any], dataset: Dataset, dense: int) -> str:
    """Steps, rows and parameters of the run in one line."""
    rows = dataset.split(config.data.train).rows
    steps = total_steps(config, rows)
    return (
        f"{config.name}: {steps:,} steps of {config.train.batch_size:,} samples over {rows:,} rows, "
        f"model '{config.model.name}' with {dense:,} dense parameters, run directory {config.folder}"
    )
