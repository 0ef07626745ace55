"""Models, plans, checkpoints, run directories and launches that are not usable."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from tests.bad_input import shop
from tests.bad_input.case import Case, changed, write_yaml
from thresher.data.schema import Schema
from thresher.embeddings.tables import find_tables
from thresher.errors import CheckpointError, ConfigError, DataError, LaunchError, PlanError, SchemaError, ThresherError
from thresher.launch.group import check_batches, check_device
from thresher.launch.local import evaluate_here, run_config
from thresher.launch.place import Place, read_place
from thresher.launch.preparing import dataset_for
from thresher.launch.processes import run_ranks
from thresher.launch.worker import train as work
from thresher.sharding.check import check_plan
from thresher.sharding.plan import Plan
from thresher.trainer.assemble import plan_of
from thresher.trainer.config import LaunchConfig, RunConfig, TrainConfig
from thresher.trainer.run import evaluate, train
from thresher.trainer.world import World
from thresher.zoo.registry import RunConfig as AnyRunConfig

CONFIG: dict[str, Any] = {
    "name": "shop",
    "run_dir": "run",
    "data": {"path": "shop"},
    "model": {"name": "lr"},
    "train": {"batch_size": 16, "max_steps": 4},
    "tensorboard": False,
}


def config_of(changes: dict[str, Any]) -> RunConfig[Any]:
    config: RunConfig[Any] = AnyRunConfig.model_validate(changed(changes, CONFIG))
    return config


def _schema(changes: dict[str, Any]) -> Schema:
    return Schema.model_validate(changed(changes, shop.SCHEMA))


def _model(
    id: str, model: dict[str, Any], error: type[ThresherError], *told: str, schema: dict[str, Any] | None = None
) -> Case:
    def act(_: Path) -> object:
        return config_of({"model": model}).model.build(_schema(schema or {}), torch.device("meta"))

    return Case(id, act, error, told)


WITHOUT_SEQUENCE = {"features": [f for f in shop.SCHEMA["features"] if f["kind"] != "sequence"]}
WITHOUT_LABEL = {"features": [f for f in shop.SCHEMA["features"] if f["kind"] != "label"]}
WITHOUT_IDS = {"features": [f for f in shop.SCHEMA["features"] if f["kind"] in ("dense", "label")]}

MODELS = (
    _model(
        "unknown feature",
        {"name": "fm", "features": ["usr"]},
        ConfigError,
        "model.features: no feature 'usr'",
        "'user'",
    ),
    _model(
        "label for a feature", {"name": "fm", "features": ["bought"]}, ConfigError, "'bought' is a label, not an input"
    ),
    _model(
        "unknown label",
        {"name": "lr", "labels": ["buy"]},
        ConfigError,
        "model.labels: no label 'buy'",
        "Allowed: bought",
    ),
    _model("label given twice", {"name": "lr", "labels": ["bought"] * 2}, ConfigError, "label 'bought' is given twice"),
    _model("no label in the data", {"name": "lr"}, SchemaError, "schema 'shop'", "no label", schema=WITHOUT_LABEL),
    _model("no ids in the data", {"name": "lr"}, ConfigError, "model.features", "no id feature", schema=WITHOUT_IDS),
    _model("attention without a sequence", {"name": "din"}, SchemaError, "no sequence", schema=WITHOUT_SEQUENCE),
    _model("next item without a sequence", {"name": "sasrec"}, SchemaError, "sequence", schema=WITHOUT_SEQUENCE),
)


def _plan(id: str, changes: dict[str, Any], *told: str, world: int = 2) -> Case:
    def act(_: Path) -> object:
        config = config_of(changes)
        model = config.model.build(_schema({}), torch.device("meta"))
        return plan_of(config, model, world, world, "cpu")

    return Case(id, act, PlanError, told)


def _pinned(id: str, change: Callable[[dict[str, Any]], object], *told: str) -> Case:
    def act(folder: Path) -> object:
        config = config_of({"model": {"name": "fm", "dim": 8}})
        model = config.model.build(_schema({}), torch.device("meta"))
        plan_of(config, model, 2, 2, "cpu").save(folder / "plan.json")
        values = json.loads((folder / "plan.json").read_text())
        change(values)
        (folder / "plan.json").write_text(json.dumps(values))
        pinned = config.model_copy(update={"sharding": config.sharding.model_copy(update={"plan": "plan.json"})})
        plan: Plan = plan_of(pinned, model, 2, 2, "cpu")
        return check_plan(plan, find_tables(model), 2, 2, "plan.json")

    return Case(id, act, PlanError, ("plan.json", *told))


PLANS = (
    _plan("type for an unknown table", {"sharding.tables": {"user": "row_wise"}}, "sharding.tables.user", "'users'"),
    _plan("table that fits nowhere", {"sharding.memory_gb": 1e-7}, "GB", "sharding.memory_gb"),
    _plan(
        "columns that cannot be cut",
        {"model": {"name": "lr"}, "sharding.default": "column_wise"},
        "cannot be column_wise on 4 ranks",
        "Choose one of",
        world=4,
    ),
    _plan(
        "replicated sequence table",
        {"model": {"name": "din"}, "sharding.default": "data_parallel"},
        "cannot be data_parallel",
        "Choose one of",
    ),
    _plan("missing plan file", {"sharding.plan": "nowhere.json"}, "nowhere.json: cannot be read", "plan.json saved by"),
    _pinned("plan for another world", lambda p: p.update(world=4), "the plan is for 4 ranks", "Start 4 ranks"),
    _pinned("plan for another shape", lambda p: p["tables"][0].update(rows=7), "is 7 x", "plan anew"),
    _pinned("plan without a table", lambda p: p["tables"].pop(), "stands in the plan 0 times", "plan anew"),
    _pinned("plan that holds no plan", lambda p: p.pop("tables"), "holds no sharding plan: tables", "plan anew"),
)


@contextmanager
def one_rank() -> Iterator[World]:
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, 0, 1, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@cache
def _trained() -> Path:
    """A folder that holds a data set and a finished run on it."""
    folder = Path(tempfile.mkdtemp(prefix="thresher-bad-input-"))
    shop.make(folder / "shop")
    _train(folder)
    return folder


def _train(folder: Path, changes: dict[str, Any] | None = None) -> object:
    paths = {"data.path": str(folder / "shop"), "run_dir": str(folder / "run")}
    with one_rank() as world:
        return train(config_of(paths | (changes or {})), world)


def _resumed(
    id: str,
    damage: Callable[[Path], object],
    error: type[ThresherError],
    *told: str,
    changes: dict[str, Any] | None = None,
) -> Case:
    def act(folder: Path) -> object:
        for name in ("shop", "run"):
            shutil.copytree(_trained() / name, folder / name)
        config = folder / "run" / "config.yaml"
        config.write_text(config.read_text().replace(str(_trained()), str(folder)))
        damage(folder)
        return _train(folder, {"train.max_steps": 8} | (changes or {}))

    return Case(id, act, error, told)


def _untouched(_: Path) -> None:
    return


def _evaluate(split: str, step: int) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        with one_rank() as world:
            return evaluate(folder / "run", run_config(folder / "run"), split, step, world)

    return act


def _other_rows(folder: Path) -> None:
    shutil.rmtree(folder / "shop")
    shop.make(folder / "shop", rows=80)


def _checkpoint(folder: Path) -> Path:
    return next((folder / "run" / "checkpoints").glob("step-*"))


def _flip(folder: Path) -> None:
    shard = next(_checkpoint(folder).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _unlink_shard(folder: Path) -> None:
    next(_checkpoint(folder).glob("*.distcp")).unlink()


def _file_in_the_way(folder: Path) -> object:
    shop.make(folder / "shop")
    (folder / "run").write_text("")
    return _train(folder)


RUNS = (
    _resumed(
        "run of another configuration",
        _untouched,
        ConfigError,
        "run/config.yaml: this run was started with other settings: seed was 0, is 1",
        "set another run_dir",
        changes={"seed": 1},
    ),
    _resumed(
        "run of another model", _untouched, ConfigError, "model.name was 'lr', is 'fm'", changes={"model.name": "fm"}
    ),
    _resumed("run on other rows", _other_rows, CheckpointError, "was trained on other rows than split 'train'"),
    _resumed("corrupt checkpoint", _flip, CheckpointError, "no intact checkpoint; step-00000004", "Restore"),
    _resumed("checkpoint with a missing file", _unlink_shard, CheckpointError, "is missing"),
    _resumed("checkpoint that does not exist", _evaluate("test", 99), CheckpointError, "step-00000099", "Load"),
    _resumed("evaluation of an unknown split", _evaluate("tset", -1), DataError, "no split 'tset'", "'test'"),
    _resumed("configuration of a run damaged", lambda f: (f / "run/config.yaml").write_text("a: ["), ConfigError),
    Case("file where the run directory should be", _file_in_the_way, ConfigError, ("run", "Set run_dir to a folder")),
    Case(
        "evaluation of no run",
        lambda f: evaluate_here(f, "test", -1, 0),
        ConfigError,
        ("is no run directory", "Give a folder that training has made"),
    ),
)


def _too_few_rows(folder: Path) -> object:
    shop.make(folder / "shop", rows=8)
    return _train(folder)


def _no_data(folder: Path) -> object:
    return work(Place(0, 3, 0, 3), [str(write_yaml(folder / "run.yaml", CONFIG))])


def _recipe(**data: Any) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        out = folder / "made"
        dataset_for(out, "synthetic", {"rows": 200, "table_rows": 50}, "run.yaml")
        return dataset_for(out, data["recipe"], data["options"], "run.yaml")

    return act


def _logs_in_the_way(folder: Path) -> object:
    (folder / "run").write_text(yaml.safe_dump(CONFIG))
    return run_ranks(["-c", "pass"], 1, folder / "run" / "logs", 1)


LAUNCHES = (
    Case(
        "world that does not fit the batch",
        lambda _: check_batches(TrainConfig(batch_size=64), 3),
        LaunchError,
        ("world size 3", "train.batch_size 64 is not divisible by 3 processes", "Set train.batch_size to 63 or 66"),
    ),
    Case(
        "world told by torchrun that does not fit the batch",
        _no_data,
        LaunchError,
        ("world size 3: train.batch_size 16 is not divisible by 3 processes", "15 or 18"),
    ),
    Case(
        "CUDA that is not there",
        lambda _: check_device(LaunchConfig(device="cuda"), 10_000),
        LaunchError,
        ("launch.device: 10000 processes need a CUDA device each", "launch.device=cpu"),
    ),
    Case("rank outside of torchrun", lambda _: read_place({}), LaunchError, ("RANK is not set", "torchrun")),
    Case(
        "rank beyond the world",
        lambda _: read_place({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}),
        LaunchError,
        ("RANK 2 is outside 0..1",),
    ),
    Case("worker without a file", lambda _: work(Place(0, 1, 0, 1), []), ConfigError, ("no configuration file",)),
    Case("logs where a file is", _logs_in_the_way, LaunchError, ("run/logs: no folder can be made", "Set run_dir")),
    Case(
        "fewer rows than a batch",
        _too_few_rows,
        ConfigError,
        ("train.batch_size", "8 rows do not fill one batch of 16"),
    ),
    Case(
        "data made with other options",
        _recipe(recipe="synthetic", options={"rows": 300, "table_rows": 50}),
        ConfigError,
        ("run.yaml: data.path", "option rows=200, not 300", "Give another data.path"),
    ),
    Case(
        "data made by another recipe",
        _recipe(recipe="ml-100k", options={}),
        ConfigError,
        ("run.yaml: data.path", "recipe 'synthetic', not 'ml-100k'"),
    ),
)

CASES = (*MODELS, *PLANS, *RUNS, *LAUNCHES)
