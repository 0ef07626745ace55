"""Whole runs on small made-up data: they learn, stop, go on, and do not depend on how many ranks there are."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from tests.multi.harness import run_ranks
from thresher.data.prepare import prepare
from thresher.data.recipes.synthetic import Synthetic
from thresher.errors import CheckpointError, ConfigError, DataError
from thresher.trainer.assemble import assemble
from thresher.trainer.callbacks.base import EndRecord
from thresher.trainer.checkpoint import CheckpointStore
from thresher.trainer.config import apply_override
from thresher.trainer.lock import locked
from thresher.trainer.run import Training, evaluate, restore, train
from thresher.trainer.state import TrainState
from thresher.trainer.step import TrainingDiverged
from thresher.trainer.world import World
from thresher.zoo.registry import RunConfig

DEADLINE_S = 120.0
ROWS = 6000


@dataclass(frozen=True)
class Job:
    """A run to start on every rank: dotted settings over the defaults below."""

    root: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, world: int) -> Any:
        values: dict[str, Any] = {
            "name": "run",
            "run_dir": str(self.root / "run"),
            "data": {"path": str(self.root / "data")},
            "model": {"name": "deepfm", "dim": 4, "mlp": {"hidden": [16]}},
            "train": {"batch_size": 128, "epochs": 1, "log_every": 5},
            "optim": {"dense": {"lr": 0.01}, "tables": {"lr": 0.1}},
            "launch": {"processes": world},
            "tensorboard": False,
        }
        for key, value in self.changes.items():
            apply_override(values, f"{key}={json.dumps(value)}")
        return RunConfig.model_validate(values)


@dataclass(frozen=True)
class Outcome:
    end: EndRecord
    weights: dict[str, torch.Tensor]


def here(rank: int, world: int) -> World:
    return World(rank, world, rank, world, torch.device("cpu"))


def run(rank: int, world: int, job: Job) -> Outcome:
    """Trains, then loads what the run left behind."""
    config = job.config(world)
    end = train(config, here(rank, world))
    parts = assemble(config, here(rank, world), _dataset(job))
    restore(parts)
    weights = {}
    for name, value in parts.sharded.wrapped.state_dict().items():
        if isinstance(value, ShardedTensor):
            local = value.local_shards()
            weights |= {f"{name}:{shard.metadata.shard_offsets}": shard.tensor.clone() for shard in local}
        else:
            weights[name] = value.clone()
    return Outcome(end, weights)


def measure(rank: int, world: int, job: Job, split: str, step: int) -> dict[str, float]:
    config = job.config(world)
    return evaluate(config.folder, config, split, step, here(rank, world)).metrics


def _dataset(job: Job) -> Any:
    from thresher.data.dataset import Dataset

    return Dataset.open(job.root / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    recipe = Synthetic(rows=ROWS, valid=0.2, test=0.1, sparse=4, table_rows=100, first_order=2.0, sequence_length=6)
    prepare(recipe, root / "data")
    return root


@pytest.fixture
def root(data: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").symlink_to(data / "data")
    return tmp_path


def records(root: Path, kind: str) -> list[dict[str, Any]]:
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_learns_and_leaves_a_folder_behind(root):
    (outcome,) = run_ranks(1, run, Job(root, {"train.epochs": 3}), timeout_s=DEADLINE_S)
    assert outcome.end.status == "done"
    assert outcome.end.step == 3 * int(ROWS * 0.7) // 128
    losses = [record["loss"] for record in records(root, "train")]
    assert losses[-1] < losses[0] - 0.03
    valid, *_, test = records(root, "eval")
    assert test["split"] == "test"
    assert test["metrics"]["auc"] > 0.65
    assert valid["split"] == "valid"
    for name in ("config.yaml", "plan.json", "facts.json", "report.html", "checkpoints"):
        assert (root / "run" / name).exists(), name


def test_two_ranks_take_the_steps_of_one(root, data, tmp_path_factory):
    other = tmp_path_factory.mktemp("one")
    (other / "data").symlink_to(data / "data")
    changes = {"train.max_steps": 20, "train.log_every": 1, "data.valid": "", "data.test": ""}
    run_ranks(2, run, Job(root, changes), timeout_s=DEADLINE_S)
    run_ranks(1, run, Job(other, changes), timeout_s=DEADLINE_S)
    two = [record["loss"] for record in records(root, "train")]
    one = [record["loss"] for record in records(other, "train")]
    assert len(two) == len(one) == 20
    assert max(abs(a - b) for a, b in zip(two, one, strict=True)) < 1e-5


def test_a_run_that_goes_on_ends_bit_equal_with_one_that_never_stopped(root, data, tmp_path_factory):
    other = tmp_path_factory.mktemp("straight")
    (other / "data").symlink_to(data / "data")
    changes = {"model.mlp.dropout": 0.3, "data.valid": "", "data.test": "", "optim.schedule.warmup_steps": 5}
    run_ranks(2, run, Job(root, changes | {"train.max_steps": 7}), timeout_s=DEADLINE_S)
    resumed = run_ranks(2, run, Job(root, changes | {"train.max_steps": 15}), timeout_s=DEADLINE_S)
    straight = run_ranks(2, run, Job(other, changes | {"train.max_steps": 15}), timeout_s=DEADLINE_S)
    for a, b in zip(resumed, straight, strict=True):
        assert a.weights.keys() == b.weights.keys()
        for name, weight in a.weights.items():
            assert torch.equal(weight, b.weights[name]), name


def test_a_run_goes_on_with_another_number_of_ranks(root, data, tmp_path_factory):
    """The same samples in the same order: losses agree to rounding with those of a run that never stopped."""
    other = tmp_path_factory.mktemp("straight")
    (other / "data").symlink_to(data / "data")
    changes = {"train.log_every": 1, "data.valid": "", "data.test": ""}
    run_ranks(2, run, Job(root, changes | {"train.max_steps": 10}), timeout_s=DEADLINE_S)
    run_ranks(1, run, Job(root, changes | {"train.max_steps": 16}), timeout_s=DEADLINE_S)
    run_ranks(4, run, Job(root, changes | {"train.max_steps": 20}), timeout_s=DEADLINE_S)
    run_ranks(1, run, Job(other, changes | {"train.max_steps": 20}), timeout_s=DEADLINE_S)
    changed = [record["loss"] for record in records(root, "train")]
    straight = [record["loss"] for record in records(other, "train")]
    assert len(changed) == len(straight) == 20
    assert max(abs(a - b) for a, b in zip(changed, straight, strict=True)) < 1e-5


def test_accumulated_dense_gradients_are_those_of_the_whole_batch(root, data, tmp_path_factory):
    """Tables hardly move here: they are updated at every micro-batch, which the next micro-batch would see."""
    other = tmp_path_factory.mktemp("whole")
    (other / "data").symlink_to(data / "data")
    changes = {"optim.dense.name": "sgd", "optim.dense.lr": 1.0, "optim.tables.name": "sgd", "optim.tables.lr": 1e-9}
    changes |= {"train.max_steps": 1, "data.valid": "", "data.test": ""}
    (parts,) = run_ranks(1, run, Job(root, changes | {"train.accumulate": 4}), timeout_s=DEADLINE_S)
    (whole,) = run_ranks(1, run, Job(other, changes), timeout_s=DEADLINE_S)
    for name, weight in whole.weights.items():
        assert torch.allclose(weight, parts.weights[name], atol=1e-6), name
    assert math.isclose(records(root, "train")[0]["loss"], records(other, "train")[0]["loss"], abs_tol=1e-6)


def test_early_stop_ends_the_run_and_measures_the_best_weights(root):
    changes = {
        "eval.every_steps": 2,
        "eval.early_stop.patience": 2,
        "eval.early_stop.min_delta": 0.5,
        "train.epochs": 50,
        "data.test": "valid",
    }
    (outcome,) = run_ranks(1, run, Job(root, changes), timeout_s=DEADLINE_S)
    assert outcome.end.status == "early stop"
    assert outcome.end.step == 6
    assert outcome.end.best["step"] == 2
    evals = records(root, "eval")
    assert evals[-1]["metrics"] == evals[0]["metrics"]
    assert evals[-1]["metrics"] != evals[1]["metrics"]
    assert evals[-1]["step"] == 2
    job = Job(root, changes)
    (again,) = run_ranks(1, measure, job, "valid", -1, timeout_s=DEADLINE_S)
    assert again == {name: pytest.approx(value, abs=1e-6) for name, value in evals[0]["metrics"].items()}
    (goes_on,) = run_ranks(1, run, job, timeout_s=DEADLINE_S)
    assert (goes_on.end.status, goes_on.end.step) == ("early stop", 6)
    assert records(root, "eval")[-1]["metrics"] == evals[0]["metrics"]


def test_evaluation_of_a_saved_step_equals_the_one_in_training(root):
    changes = {"checkpoint.every_steps": 10, "eval.every_steps": 10, "train.max_steps": 20}
    run_ranks(2, run, Job(root, changes), timeout_s=DEADLINE_S)
    told = {record["step"]: record["metrics"] for record in records(root, "eval") if record["split"] == "valid"}
    for step in (10, 20):
        (again,) = run_ranks(1, measure, Job(root, changes), "valid", step, timeout_s=DEADLINE_S)
        assert {k: pytest.approx(v, abs=1e-6) for k, v in told[step].items()} == again


@pytest.mark.parametrize(
    "changes",
    [
        {"train.precision": "bf16", "train.clip_norm": 1.0},
        {"model": {"name": "din", "dim": 4, "mlp": {"hidden": [8]}}},
        {"model": {"name": "dcnv2", "mlp": {"hidden": [8]}}, "optim.tables.name": "adagrad"},
        {"model": {"name": "lr"}, "data.shuffle": False, "train.epochs": 0.5},
    ],
)
def test_kinds_of_run(root, changes):
    (outcome,) = run_ranks(1, run, Job(root, changes | {"train.max_steps": 10}), timeout_s=DEADLINE_S)
    assert outcome.end.step == 10
    assert all(math.isfinite(record["loss"]) for record in records(root, "train"))


def test_a_diverging_run_stops_and_says_so(root):
    changes = {"optim.dense.name": "sgd", "optim.dense.lr": 1e30}
    with pytest.raises(TrainingDiverged, match=r"step \d+: the loss is (nan|inf)") as caught:
        run_ranks(1, run, Job(root, changes), timeout_s=DEADLINE_S)
    assert "optim.dense.lr" in caught.value.fix
    end = records(root, "end")[-1]
    assert end["status"] == "failed"
    assert 0 < end["step"] == int(caught.value.where.removeprefix("step "))


def ruined(rank: int, world: int, root: Path, table: bool) -> None:
    """Saves after one weight has become NaN: of a table on the rank that holds its first row, or of the dense part."""
    config = Job(root).config(world)
    parts = assemble(config, here(rank, world), _dataset(Job(root)))
    training = Training(parts, 1, ())
    state = parts.sharded.wrapped.state_dict()
    sharded = [value for value in state.values() if isinstance(value, ShardedTensor)]
    dense = [value for value in state.values() if not isinstance(value, ShardedTensor) and value.is_floating_point()]
    chosen = [part.tensor for value in sharded for part in value.local_shards()] if table else dense
    with torch.no_grad():
        chosen[0].view(-1)[0] = math.nan
    training._save(CheckpointStore(config.folder / "checkpoints", 1), TrainState(step=1))


@pytest.mark.parametrize("table", [True, False])
def test_weights_that_are_no_numbers_are_not_saved(root, table):
    with pytest.raises(TrainingDiverged, match=r"step 1: '.*' holds values that are not finite"):
        run_ranks(1, ruined, root, table, timeout_s=DEADLINE_S)
    assert not list((root / "run").glob("checkpoints/step-*"))


def test_a_metric_to_stop_by_that_is_not_measured_is_told_before_the_first_step(root):
    changes = {"eval.early_stop.metric": "aucc", "eval.early_stop.patience": 1}
    with pytest.raises(ConfigError, match=r"eval.early_stop.metric: 'aucc' is not measured. Did you mean 'auc'"):
        run_ranks(1, run, Job(root, changes), timeout_s=DEADLINE_S)
    assert not (root / "run" / "metrics.jsonl").exists()


def test_an_empty_split_is_told_before_the_first_step(root):
    (root / "data").unlink()
    prepare(Synthetic(rows=300, valid=0.2, test=0.0, sparse=4, table_rows=100), root / "data")
    manifest = root / "data" / "dataset.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"splits": values["splits"] | {"test": []}}))
    with pytest.raises(DataError, match=r"split 'test' has no rows. Prepare the data .* leave data.valid or data.test"):
        run_ranks(1, run, Job(root), timeout_s=DEADLINE_S)
    assert not (root / "run" / "metrics.jsonl").exists()


def test_a_second_run_in_the_folder_is_refused_and_the_first_unharmed(root):
    with locked(_made(root / "run")), pytest.raises(ConfigError, match=r"process \d+ on .* trains into this folder"):
        run_ranks(2, run, Job(root), timeout_s=DEADLINE_S)
    assert sorted(path.name for path in (root / "run").iterdir()) == [".lock", "checkpoints", "logs"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_missing_split_is_told_before_the_first_step(root):
    with pytest.raises(DataError, match=r"no split 'dev'.*test, train, valid"):
        run_ranks(1, run, Job(root, {"data.valid": "dev"}), timeout_s=DEADLINE_S)
    assert not (root / "run" / "metrics.jsonl").exists()


def test_other_rows_are_not_taken_for_the_ones_the_run_began_with(root):
    run_ranks(1, run, Job(root, {"train.max_steps": 2}), timeout_s=DEADLINE_S)
    (root / "data").unlink()
    prepare(
        Synthetic(rows=ROWS, valid=0.2, test=0.1, sparse=4, table_rows=100, sequence_length=6, seed=9), root / "data"
    )
    with pytest.raises(CheckpointError, match="was trained on other rows than split 'train'"):
        run_ranks(1, run, Job(root, {"train.max_steps": 4}), timeout_s=DEADLINE_S)


def test_a_run_does_not_go_on_with_another_model(root):
    run_ranks(1, run, Job(root, {"train.max_steps": 2}), timeout_s=DEADLINE_S)
    with pytest.raises(ConfigError, match=r"model\.dim was 4, is 8"):
        run_ranks(1, run, Job(root, {"train.max_steps": 4, "model.dim": 8}), timeout_s=DEADLINE_S)
