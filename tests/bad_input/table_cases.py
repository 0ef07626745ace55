"""Tiers, fields, raw ids, what ranks send each other, and optimizers of tables that are not usable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bad_input import shop
from tests.bad_input.case import CONFIG, Case, changed, write_yaml
from tests.bad_input.run_cases import config_of, one_rank
from thresher.data.schema import Schema
from thresher.embeddings.policy.config import TierStorage
from thresher.embeddings.policy.storage import SlabFiles
from thresher.embeddings.rows.region import Region
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import ConfigError, PlanError, ThresherError
from thresher.trainer.assemble import plan_of
from thresher.trainer.config import load_config
from thresher.trainer.run import train
from thresher.zoo.registry import RunConfig


def _key(id: str, changes: dict[str, Any], *told: str) -> Case:
    def act(folder: Path) -> object:
        return load_config(RunConfig, write_yaml(folder / "run.yaml", changed(changes, CONFIG)))

    return Case(id, act, ConfigError, ("run.yaml", *told))


TIERED: dict[str, Any] = {"model": {"name": "fm", "dim": 16}, "tiers.budget": "90%", "tiers.flat_below_bytes": 0}


def _tiers(id: str, changes: dict[str, Any], *told: str) -> Case:
    def act(_: Path) -> object:
        config = config_of(TIERED | changes)
        model = config.model.build(Schema.model_validate(shop.SCHEMA), torch.device("meta"))
        return plan_of(config, model, 1, 1, "cpu")

    return Case(id, act, ConfigError, told)


def _run(id: str, changes: dict[str, Any], error: type[ThresherError], *told: str) -> Case:
    def act(folder: Path) -> object:
        shop.make(folder / "shop")
        with one_rank() as world:
            return train(config_of(TIERED | changes), world)

    return Case(id, act, error, told)


def _slabs(folder_of: Callable[[Path], Path]) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        return SlabFiles(TierStorage(folder=folder_of(folder))).paths("t", (Tier.INT8,), 100, 16, 0)

    return act


def _slab_without_a_folder(folder: Path) -> object:
    return Region(1 << 21, write_yaml(folder / "file", CONFIG) / "slab")


KEYS = (
    _key("unknown tier", {"tiers.levels": ["int3"]}, "tiers.levels[0]: 'int3' is not known", "'int8'"),
    _key("no tier at all", {"tiers.levels": []}, "tiers.levels: has too few entries: needs at least 1", "Add one"),
    _key("number for a budget", {"tiers.budget": 0.4}, "tiers.budget: expects text, got 0.4", "quotes"),
    _key("tiers without a budget", {"tiers.levels": ["int8"]}, "tiers.levels is given, but without a budget", "40%"),
    _key(
        "files without a budget",
        {"tiers.storage.folder": "/scratch"},
        "tiers.storage is given, but without a budget there are no tiers",
        "Set tiers.budget",
    ),
    _key("decay of all", {"tiers.decay": 1.0}, "tiers.decay: must be less than 1"),
    _key("spread of none", {"tiers.spread": 1}, "tiers.spread: must be greater than 1"),
    _key("no memory for files", {"tiers.storage.ram_gb": 0}, "tiers.storage.ram_gb: must be greater than 0"),
    _key("rounds without scores", {"fields.rounds": 2}, "score_every is 0", "Set it to a number of steps"),
    _key(
        "fields dropped without a validation split",
        {"fields.rounds": 2, "fields.score_every": 5, "data.valid": ""},
        "fields.rounds drops fields only as long as the validation split allows it",
        "fields.rounds to 0",
    ),
    _key("rare ids never", {"dynamic.users.min_count": 0}, "dynamic.users.min_count: must be at least 1"),
    _key("unknown eviction", {"dynamic.users.evict": "lur"}, "dynamic.users.evict: 'lur' is not known", "'lru'"),
    _key("unknown wire", {"sharding.wire.forward": "fp8"}, "sharding.wire.forward: 'fp8' is not known", "bf16"),
    _key("gradients in int8", {"sharding.wire.backward": "int8"}, "'int8' is not known", "bf16, fp16, fp32"),
    _key("wire in a word", {"sharding.wire": "int8"}, "sharding.wire: expects keys, got 'int8'"),
    _key("unknown table optimizer", {"optim.tables.name": "lamb"}, "optim.tables.name: 'lamb' is not known", "adam"),
    _key("momentum of one", {"optim.tables.betas": [1.0, 0.9]}, "optim.tables.betas[0]: must be less than 1"),
    _key("momentum missing", {"optim.tables.betas": [0.9]}, "optim.tables.betas: has too few entries: entry 2"),
    _key("dense momentum above one", {"optim.dense.betas": [2, 0.9]}, "optim.dense.betas[0]: must be less than 1"),
    _key("penalty nobody reads", {"optim.tables.l2": 0.1}, "l2 is of ftrl", "Set weight_decay, or choose ftrl"),
)

PLANS = (
    _tiers("budget in words", {"tiers.budget": "lots"}, "tiers.budget: 'lots' is no budget", "40%", "2GB"),
    _tiers("budget of nothing", {"tiers.budget": "0%"}, "allows no byte at all", "Leave it empty"),
    _tiers("negative budget", {"tiers.budget": "-3GB"}, "'-3GB' is no budget"),
    _tiers("budget above the whole", {"tiers.budget": "400%"}, "tiers.budget: '400%' is more than", "at most 100%"),
    _tiers("budget nobody can meet", {"tiers.budget": "5%"}, "they cannot take less than", "or more"),
    _tiers(
        "budget for small tables only",
        {"tiers.budget": "40%", "tiers.flat_below_bytes": 1 << 20},
        "no larger than 1.0 MB",
        "lower tiers.flat_below_bytes",
    ),
    _tiers("tiers of no table", {"tiers.tables": {"user": {"levels": ["int8"]}}}, "tiers.tables.user", "'users'"),
    _tiers("protection of no table", {"tiers.protect": ["usrs"]}, "tiers.protect: the model has no table", "'users'"),
    _tiers(
        "protected and tiered",
        {"tiers.protect": ["users"], "tiers.tables": {"users": {"levels": ["int8"]}}},
        "is protected and has levels int8",
        "Remove one of the two",
    ),
    _tiers("tiers without weights", {"tiers.levels": ["dropped"]}, "tiers.levels: no level holds weights", "Add fp32"),
    _tiers(
        "files that hold nothing",
        {"tiers.storage": {"folder": "/scratch", "tiers": ["int4"]}},
        "tiers.storage: no table has rows in tiers int4",
        "remove tiers.storage.folder",
    ),
)

RUNS = (
    _run("raw ids of no table", {"dynamic": {"users": {}}}, ConfigError, "dynamic.users", "ids=raw"),
    _run("protected field unknown", {"fields": {"score_every": 2, "protect": ["usr"]}}, ConfigError, "'user'"),
    _run(
        "fields judged by nothing",
        {"fields": {"score_every": 2, "rounds": 1, "metric": "acc"}},
        ConfigError,
        "fields.metric: 'acc' is not measured",
        "'auc'",
    ),
    Case(
        "files below a file",
        _slabs(lambda folder: write_yaml(folder / "file", CONFIG) / "slabs"),
        PlanError,
        ("tiers.storage.folder", "no folder can be made there", "Set it to a folder that can be written"),
    ),
    Case("slab that cannot be made", _slab_without_a_folder, PlanError, ("slab: ", "Choose a folder")),
)

CASES = (*KEYS, *PLANS, *RUNS)
