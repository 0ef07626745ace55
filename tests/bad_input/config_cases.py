"""Configuration files and overrides that are not usable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.case import CONFIG, Case, changed, write_yaml
from thresher.errors import ConfigError
from thresher.trainer.config import load_config
from thresher.zoo.registry import RunConfig


def _load(values: object, *overrides: str) -> Callable[[Path], object]:
    return lambda folder: load_config(RunConfig, write_yaml(folder / "run.yaml", values), overrides)


def _changed(id: str, changes: dict[str, Any], *told: str) -> Case:
    return Case(id, _load(changed(changes)), ConfigError, ("run.yaml", *told))


def _file(id: str, content: str | bytes, *told: str) -> Case:
    return Case(id, _load(content), ConfigError, ("run.yaml", *told))


def _override(id: str, override: str, *told: str) -> Case:
    return Case(id, _load(CONFIG, override), ConfigError, told)


def _folder(folder: Path) -> object:
    (folder / "run.yaml").mkdir()
    write_yaml(folder / "run.yaml" / "inner.yaml", CONFIG)
    return load_config(RunConfig, folder / "run.yaml")


def _missing(folder: Path) -> object:
    write_yaml(folder / "runs.yaml", CONFIG)
    return load_config(RunConfig, folder / "run.yaml")


def _below_a_file(folder: Path) -> object:
    write_yaml(folder / "file", CONFIG)
    return load_config(RunConfig, folder / "file" / "run.yaml")


def _unreadable(folder: Path) -> object:
    (folder / "run.yaml").symlink_to(folder / "run.yaml")
    return load_config(RunConfig, folder / "run.yaml")


KEYS = (
    _changed("unknown key", {"modle": 1}, ": modle: unknown key", "Did you mean 'model'?"),
    _changed("unknown key in data", {"data.pth": "x"}, ":3: data.pth: unknown key", "'path'"),
    _changed("unknown key in train", {"train.batchsize": 3}, "train.batchsize: unknown key", "'batch_size'"),
    _changed("unknown key two levels down", {"optim.dense.rate": 3}, "optim.dense.rate: unknown key", "lr"),
    _changed("unknown key of the chosen model", {"model.poling": "sum"}, "model.poling: unknown key", "'pooling'"),
    _changed(
        "key of another model",
        {"model": {"name": "lr", "hidden": [8]}},
        "model.hidden: unknown key",
        "Allowed: features",
    ),
    _changed("unknown key in launch", {"launch.proceses": 2}, "launch.proceses: unknown key", "'processes'"),
    _changed("unknown key in early stop", {"eval.early_stop.patince": 2}, "eval.early_stop.patince", "'patience'"),
    _changed("missing name", {"name": ...}, "name: required key is absent", "Add 'name'"),
    _changed("missing data path", {"data.path": ...}, "data.path: required key is absent", "Add 'path'"),
    _changed("missing model", {"model": ...}, "model: required key is absent"),
    _changed("model without a name", {"model": {"dim": 8}}, "model.name: required key is absent", "one of: dcnv2,"),
    _changed(
        "several faults", {"modle": 1, "train.batch_size": "x", "train.epochs": -1}, "3 faults", "'x'", "greater than 0"
    ),
)

VALUES = (
    _changed("unknown model", {"model.name": "deepffm"}, "model.name: 'deepffm' is not known", "'deepfm'"),
    _changed("text for a number", {"train.batch_size": "many"}, "train.batch_size: expects a whole number, got 'many'"),
    _changed("fraction for a whole number", {"train.batch_size": 1.5}, "train.batch_size: expects a whole number"),
    _changed("boolean for a number", {"train.accumulate": True}, "train.accumulate: expects a number, got true"),
    _changed("number for a text", {"name": 7}, "name: expects text, got 7", "Put quotes around it"),
    _changed("a YAML no for a text", {"data.recipe": False}, "data.recipe: expects text, got false", "quotes"),
    _changed("text for a boolean", {"data.shuffle": "perhaps"}, "data.shuffle: expects true or false, got 'perhaps'"),
    _changed("value for a section", {"train": 4}, "train: expects keys, got 4", "'key: value' lines below it"),
    _changed("empty section", {"train": None}, "train: expects keys, got nothing"),
    _changed("value for a list", {"eval.at": 10}, "eval.at: expects a list, got 10", "[a, b]"),
    _changed("bad list entry", {"eval.at": [10, 0]}, "eval.at[1]: must be at least 1, got 0", "at least 1"),
    _changed("unknown choice", {"train.precision": "fp16"}, "train.precision: 'fp16' is not known", "bf16, fp32"),
    _changed(
        "unknown sharding type",
        {"sharding.tables": {"users": "row"}},
        "sharding.tables.users: 'row' is not",
        "'row_wise'",
    ),
    _changed("negative seed", {"seed": -1}, "seed: must be at least 0, got -1"),
    _changed("zero epochs", {"train.epochs": 0}, "train.epochs: must be greater than 0, got 0"),
    _changed("infinite learning rate", {"optim.dense.lr": float("inf")}, "optim.dense.lr: expects a finite number"),
    _changed("rate that is no number", {"optim.dense.lr": float("nan")}, "optim.dense.lr: expects a finite number"),
    _changed("share above one", {"data.max_bad_share": 2}, "data.max_bad_share: must be at most 1, got 2"),
    _changed("name with a slash", {"name": "a/b"}, "name: 'a/b' does not fit the pattern"),
    _changed("no processes", {"launch.processes": 0}, "launch.processes: must be at least 1, got 0"),
    _changed(
        "batch that does not divide",
        {"launch.processes": 3},
        "train.batch_size 64 is not divisible by launch.processes x train.accumulate = 3",
        "Set train.batch_size to a multiple of 3",
    ),
    _changed(
        "early stop without a validation split",
        {"eval.early_stop.patience": 2, "data.valid": ""},
        "eval.early_stop.patience 2 needs a validation split, but data.valid is empty",
        "Set data.valid to the name of a split, or eval.early_stop.patience to 0",
    ),
    _changed("embedding of no width", {"model.dim": 0}, "model.dim: must be"),
)

FILES = (
    _file("empty file", "", "is empty", "'key: value' lines"),
    _file("comments only", "# name: x\n", "is empty"),
    _file("list in place of keys", "- a\n- b\n", "holds a list, not keys"),
    _file("text in place of keys", "just words\n", "holds a single value, not keys"),
    _file("binary file", bytes(range(256)), "is not UTF-8 text"),
    _file("control characters", b"name: \x00x", "special characters are not allowed"),
    _file("tab", "name: x\ndata:\n\tpath: y\n", "run.yaml:3:1", "no tabs"),
    _file("duplicate key", "name: x\nseed: 1\nname: y\n", "run.yaml:3:1", "key 'name' stands twice", "Remove one"),
    _file("duplicate inner key", "data: {path: x, path: y}\n", "run.yaml:1:17", "key 'path' stands twice"),
    _file("open bracket", "eval: {at: [1, 2}\n", "run.yaml:1:17", "Check indentation, colons and quotes"),
    _file("bad indentation", "data:\n  path: x\n recipe: y\n", "run.yaml:3"),
    _file("two documents", "name: x\n---\nname: y\n", "run.yaml:2", "another document"),
    _file("unknown tag", "name: !!python/object:os.system x\n", "run.yaml:1:7", "could not determine a constructor"),
    _file("impossible date", "name: 2026-13-45\n", "month must be in 1..12", "quotes"),
    _file("unknown alias", "name: *nobody\n", "run.yaml:1:7", "undefined alias"),
    _file("endless nesting", "[" * 5000 + "]" * 5000, "nested too deeply"),
    Case("missing file", _missing, ConfigError, ("run.yaml: no such file", "Did you mean 'runs.yaml'?")),
    Case("folder for a file", _folder, ConfigError, ("run.yaml: is a folder, not a file", "inner.yaml")),
    Case("file for a folder", _below_a_file, ConfigError, ("no such file", "Give the path of an existing YAML file")),
    Case("unreadable file", _unreadable, ConfigError, ("run.yaml: cannot be read", "Give a readable file")),
)

OVERRIDES = (
    _override("override without a value", "seed", "command line: 'seed' is no override", "Write key.path=value"),
    _override("override without a key", "=3", "'=3' is no override"),
    _override("override with an empty key", "train..epochs=3", "'train..epochs=3' is no override"),
    _override("unknown override", "train.epoch=3", "override train.epoch: unknown key", "'epochs'"),
    _override("override of the wrong type", "train.epochs=x", "override train.epochs: expects a number, got 'x'"),
    _override("override through a value", "name.first=x", "override name.first: 'name' holds a value, not keys"),
    _override("override that is no YAML", "eval.at=[1", "override eval.at:1", "Check indentation"),
    _override("override by nothing", "seed=", "override seed: expects a whole number, got nothing"),
    _override("text overridden by nothing", "data.valid=", "override data.valid: expects text, got nothing", "'\"\"'"),
    _override("override by a mapping with a twin", "data={path: x, path: y}", "override data", "'path' stands twice"),
)

CASES = (*KEYS, *VALUES, *FILES, *OVERRIDES)
