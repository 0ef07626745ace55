"""Pipelines that cannot be: in the configuration, on the processes at hand, or for a model and its data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bad_input.case import Case, changed, write_yaml
from thresher.data.recipes.registry import build_recipe
from thresher.data.schema import Schema
from thresher.errors import ConfigError, DataError, LaunchError, ScheduleError
from thresher.launch.group import check_batches
from thresher.pipeline.runtime.stage import build_parts
from thresher.trainer.config import TrainConfig, load_config
from thresher.trainer.pipelined.config import PipelineConfig
from thresher.trainer.pipelined.schedule import require_plain, schedule_of, slice_bounds
from thresher.zoo.registry import RunConfig
from thresher.zoo.transformer.config import TransformerConfig

BASE: dict[str, Any] = {
    "name": "bad",
    "data": {"path": "data"},
    "model": {"name": "transformer", "dim": 16, "heads": 2},
    "train": {"batch_size": 64},
    "pipeline": {"stages": 2, "slices": 4, "microbatches": 2},
    "launch": {"processes": 2},
}
SCHEMA = Schema.model_validate(
    {
        "name": "text",
        "tables": [{"name": "token", "rows": 11, "ids": "index"}],
        "features": [{"kind": "sequence", "name": "text", "table": "token", "max_length": 9}],
    }
)


def _config(id: str, changes: dict[str, Any], *told: str) -> Case:
    def act(folder: Path) -> object:
        return load_config(RunConfig, write_yaml(folder / "run.yaml", changed(changes, BASE)))

    return Case(id, act, ConfigError, ("run.yaml", *told))


def _cut(pipeline: dict[str, Any], **model: Any) -> Callable[[Path], object]:
    """Everything between the configuration and the first message, for the last rank."""

    def act(_: Path) -> object:
        config, settings = TransformerConfig(**{"dim": 16, "heads": 2, **model}), PipelineConfig(**pipeline)
        trunk, length = config.trunk(SCHEMA, 0), config.sequencer(SCHEMA).length
        share = config.attention_share(length)
        schedule = schedule_of(settings, trunk, slice_bounds(settings, length, 1, share), share)
        return build_parts(trunk, schedule.shape, settings.stages - 1, torch.device("cpu"))

    return act


def _text(content: bytes, **options: Any) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        (folder / "a.txt").write_bytes(content)
        return list(build_recipe("text", {"source": str(folder / "a.txt"), **options}).chunks())

    return act


SETTINGS = (
    _config("no stages", {"pipeline.stages": 0}, "pipeline.stages: must be at least 1, got 0"),
    _config("unknown key of a pipeline", {"pipeline.chunk": 2}, "pipeline.chunk: unknown key", "'chunks'"),
    _config(
        "fewer slices than stages", {"pipeline.slices": 1}, "1 slices cannot keep 2 stages busy", "Set slices to 2"
    ),
    _config("unknown policy", {"pipeline.policy": "1f2b"}, "policy '1f2b' is not known", "1f1b"),
    _config("slack of three", {"pipeline.slack": 3}, "pipeline.slack: must be at most 2, got 3"),
    _config("exchange of a rival", {"pipeline.policy": "seq1f1b", "pipeline.exchange": "auto"}, "has no exchange"),
    _config("exchange of packed rows", {"pipeline.packing": "packed", "pipeline.exchange": 1}, "packing: padded"),
    _config("exchange of nothing", {"pipeline.exchange": 0}, "pipeline.exchange"),
    _config("offload of more than all", {"pipeline.offload": 1.5}, "pipeline.offload: must be at most 1, got 1.5"),
    _config("no time for messages", {"pipeline.timeout_s": 0}, "pipeline.timeout_s: must be greater than 0"),
    _config("pipeline of a ranker", {"model": {"name": "deepfm"}}, "model 'deepfm' cannot be cut into stages"),
    _config("accumulation in a pipeline", {"train.accumulate": 2}, "train.accumulate 2", "pipeline.microbatches"),
    _config("processes that form no pipelines", {"launch.processes": 3}, "launch.processes 3", "a multiple of 2"),
    _config("batch of unequal microbatches", {"pipeline.microbatches": 3}, "batch_size 64 is not divisible", "= 3"),
    _config("heads that do not divide", {"model.heads": 3}, "dim 16 is not a multiple of heads 3"),
    _config("groups that do not divide", {"model.heads": 4, "model.kv_heads": 3}, "heads 4 is not a multiple"),
    Case(
        "tiers in a pipeline",
        lambda folder: require_plain(
            load_config(RunConfig, write_yaml(folder / "run.yaml", changed({"tiers.budget": "50%"}, BASE)))
        ),
        ConfigError,
        ("tiers: is about sharded tables", "train without the pipeline section"),
    ),
)

LAUNCHES = (
    Case(
        "world that forms no pipelines",
        lambda _: check_batches(TrainConfig(batch_size=64), 3, PipelineConfig(stages=2, slices=2)),
        LaunchError,
        ("world size 3: 3 processes do not form pipelines of 2 stages", "Start a multiple of 2 processes"),
    ),
    Case(
        "world whose pipelines do not fit the batch",
        lambda _: check_batches(TrainConfig(batch_size=64), 6, PipelineConfig(stages=2, slices=2, microbatches=2)),
        LaunchError,
        ("64 is not divisible by 3 pipelines x pipeline.microbatches 2 = 6", "Set train.batch_size to 60 or 66"),
    ),
)

MODELS = (
    Case(
        "fewer layers than stages",
        _cut({"stages": 2, "chunks": 2, "slices": 2}, layers=3),
        ScheduleError,
        ("3 layers cannot fill 4 stages", "Use at most 3 stages in all"),
    ),
    Case(
        "sequences shorter than the slices are many",
        _cut({"stages": 2, "slices": 5}, max_length=4),
        ConfigError,
        ("pipeline.slices: sequences of 4 tokens cannot be cut into 5 slices", "Use at most 4 slices"),
    ),
    Case(
        "too few tokens for balanced slices",
        _cut({"slices": 8, "slice_bounds": "balanced"}, dim=2, heads=1, ffn=2),
        ConfigError,
        ("pipeline.slice_bounds: 8 slices of 8 tokens", "slice_bounds: even"),
    ),
    Case(
        "exchange between unequal stages",
        _cut({"stages": 2, "slices": 2, "exchange": "auto"}, layers=3),
        ConfigError,
        ("pipeline.exchange: 3 layers on 2 stages are unequal", "Use a multiple of 2 layers, or exchange: off"),
    ),
    Case(
        "tied output layer on another rank",
        _cut({"stages": 2, "slices": 2}, tied=True),
        ScheduleError,
        ("the output layer is tied to the embedding, but they are on different ranks", "Set both, or untie them"),
    ),
)

TEXTS = (
    Case("text of one token", _text(b"a"), DataError, ("a.txt", "fewer than two tokens", "longer text")),
    Case(
        "text that is no text",
        _text(b"abc\xff", level="character"),
        DataError,
        ("a.txt: is no text in UTF-8", "at byte 3", "level=byte"),
    ),
    Case("windows with gaps", _text(b"abc", length=2, stride=3), ConfigError, ("stride 3 is above length 2",)),
)

CASES = (*SETTINGS, *LAUNCHES, *MODELS, *TEXTS)
