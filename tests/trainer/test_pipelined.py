"""Runs cut into stages: the same losses, weights, checkpoints and metrics as a run in one piece."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.multi.harness import run_ranks
from thresher.data.dataset import Dataset
from thresher.data.prepare import prepare
from thresher.data.recipes.text import Text
from thresher.data.recipes.user_item import UserItem
from thresher.errors import ConfigError, ScheduleError
from thresher.launch.cli import run as thresher
from thresher.launch.dry_run import pipeline_line
from thresher.trainer.assemble import assemble
from thresher.trainer.config import apply_override
from thresher.trainer.run import evaluate, restore, train
from thresher.trainer.world import World
from thresher.zoo.registry import RunConfig

DEADLINE_S = 150.0
STEPS = 6
CUT = {"stages": 2, "chunks": 2, "slices": 4, "microbatches": 2}
SPLIT = {"split_embedding": True, "split_head": True}


@dataclass(frozen=True)
class Job:
    """A run on every rank: dotted settings over the defaults below."""

    root: Path
    data: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, world: int) -> Any:
        values: dict[str, Any] = {
            "name": "run",
            "run_dir": str(self.root),
            "data": {"path": str(self.data), "valid": "", "test": ""},
            "model": {"name": "transformer", "dim": 16, "layers": 4, "heads": 2},
            "train": {"batch_size": 8, "max_steps": STEPS, "log_every": 1, "clip_norm": 0.5},
            "optim": {"dense": {"lr": 0.01}, "schedule": {"warmup_steps": 3}},
            "launch": {"processes": world},
            "tensorboard": False,
        }
        for key, value in self.changes.items():
            apply_override(values, f"{key}={json.dumps(value)}")
        return RunConfig.model_validate(values)


def here(rank: int, world: int) -> World:
    return World(rank, world, rank, world, torch.device("cpu"))


def run(rank: int, world: int, *jobs: Job) -> None:
    for job in jobs:
        train(job.config(world), here(rank, world))


def measure(rank: int, world: int, job: Job, processes: int) -> dict[str, float]:
    config = job.config(processes)
    return evaluate(config.folder, config, "test", -1, here(rank, world)).metrics


def weights(rank: int, world: int, *jobs: Job) -> list[dict[str, torch.Tensor]]:
    """What runs have left, loaded into one process without a pipeline: weights and optimizer state."""
    found = []
    for job in jobs:
        whole = Job(job.root, job.data, {**job.changes, "pipeline": {}})
        parts = assemble(whole.config(1), here(rank, world), Dataset.open(job.data))
        assert restore(parts).step == STEPS
        named = {name: value.clone() for name, value in parts.sharded.wrapped.state_dict().items()}
        for name, state in parts.dense.state_dict()["state"].items():
            named |= {f"{name}:{key}": value.clone() for key, value in state.items()}
        found.append(named)
    return found


def losses(job: Job) -> list[float]:
    lines = map(json.loads, (job.root / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in lines if record["kind"] == "train"]


def worst(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("text")
    words = torch.randint(97, 105, (4000,), generator=torch.Generator().manual_seed(0))
    (root / "a.txt").write_bytes(bytes((words - words % 2 * (words.roll(1) % 3)).tolist()))
    prepare(Text(source=root / "a.txt", length=30, test=0.1), root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def items(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("items")
    draw = torch.Generator().manual_seed(1)
    lines = []
    for user in range(60):
        count = int(torch.randint(3, 14, (), generator=draw))
        start = int(torch.randint(40, (), generator=draw))
        lines.append(" ".join(map(str, [user, *((start + 3 * at) % 40 for at in range(count))])))
    (root / "a.txt").write_text("\n".join(lines))
    prepare(UserItem(source=root / "a.txt", ids="vocabulary", max_length=10), root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: Any) -> Job:
    """A run of one process without a pipeline."""
    job = Job(tmp_path_factory.mktemp("straight"), text)
    run_ranks(1, run, job, timeout_s=DEADLINE_S)
    return job


def test_two_stages_have_the_losses_and_the_weights_of_one_process(text, straight, tmp_path):
    plain = Job(tmp_path / "plain", text, {"pipeline": CUT})
    exchanged = {**CUT, **SPLIT, "exchange": 1, "split_backward": True, "recompute": "full", "slice_bounds": "balanced"}
    full = Job(tmp_path / "full", text, {"pipeline": exchanged})
    run_ranks(2, run, plain, full, timeout_s=DEADLINE_S)
    ((wanted, *found),) = run_ranks(1, weights, straight, plain, full, timeout_s=DEADLINE_S)
    for job, state in zip((plain, full), found, strict=True):
        assert losses(job) == pytest.approx(losses(straight), abs=1e-5)
        assert worst(state, wanted) < 1e-4
    assert losses(straight)[-1] < losses(straight)[0] - 0.2


def train_and_measure(rank: int, world: int, *jobs: Job) -> list[dict[str, float]]:
    run(rank, world, *jobs)
    return [measure(rank, world, job, world) for job in jobs]


def train_and_compare(rank: int, world: int, job: Job, *others: Job) -> tuple[list[Any], list[Any]]:
    """Trains ``job``; then weights of all, and metrics of the others, without a pipeline."""
    run(rank, world, job)
    return weights(rank, world, job, *others), [measure(rank, world, other, 2) for other in others]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["softmax", "pointwise"])
def test_packed_sequences_train_as_padded_ones_do(items, tmp_path, attention):
    """Histories of 2 to 10 items, also in slices that are too many for some microbatches of about two samples."""
    changes = {"model.attention": attention, "train.batch_size": 4, "eval.at": [5]}
    packed = {**CUT, **SPLIT, "packing": "packed"}
    finer = {"slice_bounds": "balanced", "split_backward": True, "slices": 16, "recompute": "full"}
    ways = [{}, {**packed, "packing": "padded"}, packed, {**packed, **finer}]
    straight, *jobs = (
        Job(tmp_path / str(number), items, {**changes, "pipeline": way}) for number, way in enumerate(ways)
    )
    through, _ = run_ranks(2, train_and_measure, *jobs, timeout_s=DEADLINE_S)
    (((wanted, *found), whole),) = run_ranks(1, train_and_compare, straight, *jobs, timeout_s=DEADLINE_S)
    for job, state, metrics, same in zip(jobs, found, through, whole, strict=True):
        assert losses(job) == pytest.approx(losses(straight), abs=1e-5)
        assert worst(state, wanted) < 1e-4
        assert metrics == pytest.approx(same, abs=1e-5)


def test_two_replicas_take_the_steps_of_one(text, straight, tmp_path):
    changes = {"stages": 1, "slices": 3, "microbatches": 2}
    same = Job(tmp_path / "same", text, {"pipeline": changes})
    sharded = Job(tmp_path / "sharded", text, {"pipeline": {**changes, "dense": "sharded"}})
    run_ranks(2, run, same, sharded, timeout_s=DEADLINE_S)
    ((wanted, *found),) = run_ranks(1, weights, straight, same, sharded, timeout_s=DEADLINE_S)
    for job, state in zip((same, sharded), found, strict=True):
        assert losses(job) == pytest.approx(losses(straight), abs=1e-5)
        assert worst(state, wanted) < 1e-4


def test_two_pipelines_of_two_stages_train_as_one_process_does(text, straight, tmp_path):
    exact = Job(tmp_path / "exact", text, {"pipeline": {**CUT, **SPLIT}})
    halves = {"train.precision": "bf16"}
    rough, wanted = (
        Job(tmp_path / name, text, {**halves, "pipeline": way}) for name, way in (("rough", CUT), ("wanted", {}))
    )
    run_ranks(4, run, exact, rough, timeout_s=DEADLINE_S)
    ((whole, found),) = run_ranks(1, weights, straight, exact, timeout_s=DEADLINE_S)
    assert losses(exact) == pytest.approx(losses(straight), abs=1e-5)
    assert worst(found, whole) < 1e-4
    run_ranks(1, run, wanted, timeout_s=DEADLINE_S)
    assert losses(rough) == pytest.approx(losses(wanted), rel=0.02)
    assert losses(wanted) != losses(straight)
    assert losses(rough) != losses(exact)


def test_offload_is_refused_where_there_is_nowhere_to_go(text, tmp_path, capfd):
    pipeline = {"slices": 3, "offload": 0.5}
    config = Job(tmp_path / "run", text, {"pipeline": pipeline, "launch.device": "cpu"}).config(1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    assert thresher(["train", str(tmp_path / "run.yaml")]) == 2
    told = capfd.readouterr().err
    assert "ConfigError: pipeline.offload: what slices save on device 'cpu' is in host memory already" in told
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_deepspeed_takes_the_steps_of_one_process_and_resumes(text, tmp_path, name):
    """Slow: DeepSpeed builds a native part at its first use."""
    changes = {"optim.dense.name": name}
    zero = {**changes, "pipeline": {"chunks": 2, "slices": 3, "microbatches": 2, "dense": "zero1"}}
    single, whole, half, rest = (
        Job(tmp_path / "single", text, changes),
        Job(tmp_path / "whole", text, zero),
        Job(tmp_path / "parts", text, {**zero, "train.max_steps": STEPS // 2}),
        Job(tmp_path / "parts", text, zero),
    )
    run_ranks(2, run, whole, half, rest, timeout_s=DEADLINE_S)
    run_ranks(1, run, single, timeout_s=DEADLINE_S)
    ((wanted, found, resumed),) = run_ranks(1, weights, single, whole, rest, timeout_s=DEADLINE_S)
    assert losses(whole) == pytest.approx(losses(single), abs=1e-5)
    assert worst(found, wanted) < 1e-4
    assert worst(found, resumed) == 0
    assert losses(rest) == losses(whole)


def test_a_run_that_goes_on_ends_bit_equal_with_one_that_never_stopped(text, tmp_path):
    changes = {"pipeline": {**CUT, **SPLIT}, "model.dropout": 0.2, "model.tied": True}
    whole = Job(tmp_path / "whole", text, changes)
    half = Job(tmp_path / "parts", text, {**changes, "train.max_steps": STEPS // 2})
    rest = Job(tmp_path / "parts", text, {**changes, "train.max_steps": STEPS})
    run_ranks(2, run, whole, half, rest, timeout_s=DEADLINE_S)
    ((wanted, found),) = run_ranks(1, weights, whole, rest, timeout_s=DEADLINE_S)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert losses(rest) == losses(whole)


def test_a_run_goes_on_with_another_cut(text, straight, tmp_path):
    """One process, then two stages, then three slices on two replicas."""
    ways = [{}, {**CUT, **SPLIT}, {"slices": 3}]
    jobs = [
        Job(tmp_path / "run", text, {"pipeline": way, "train.max_steps": steps})
        for way, steps in zip(ways, (2, 4, STEPS), strict=True)
    ]
    run_ranks(1, run, jobs[0], timeout_s=DEADLINE_S)
    run_ranks(2, run, *jobs[1:], timeout_s=DEADLINE_S)
    assert losses(jobs[0]) == pytest.approx(losses(straight), abs=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_items_are_ranked_alike_through_the_pipeline(items, tmp_path, split):
    cut = {"stages": 2, "slices": 3, **(SPLIT if split else {})}
    job = Job(tmp_path, items, {"pipeline": cut, "eval.at": [5], "model.layers": 2})
    run_ranks(2, run, job, timeout_s=DEADLINE_S)
    through, other = run_ranks(2, measure, job, 2, timeout_s=DEADLINE_S)
    (whole,) = run_ranks(1, measure, job, 2, timeout_s=DEADLINE_S)
    assert through == other
    assert list(through) == ["mrr", "hr@5", "ndcg@5", "loss", "perplexity"]
    assert through == pytest.approx(whole, abs=1e-5)


def refused(rank: int, world: int, job: Job) -> None:
    from thresher.trainer.pipelined.parts import assemble_pipelined

    assemble_pipelined(job.config(world), here(rank, world), Dataset.open(job.data))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"pipeline": {"chunks": 5}}, ScheduleError, "4 layers cannot fill 5 stages.*use at most 4 stages"),
        ({"pipeline": {"slices": 31}}, ConfigError, r"30 tokens cannot be cut into 31 slices.*at most 30 slices"),
        (
            {"pipeline": {"slices": 241, "packing": "packed"}},
            ConfigError,
            "microbatches of 240 tokens cannot be cut",
        ),
        ({"pipeline": {"slices": 9}, "model.max_length": 8}, ConfigError, "8 tokens cannot be cut into 9 slices"),
        (
            {"pipeline": {"chunks": 3, "slices": 2, "exchange": "auto"}},
            ConfigError,
            "4 layers on 3 stages are unequal.*a multiple of 3 layers, or exchange: off",
        ),
        ({"pipeline": {"slices": 2}, "tiers.budget": "50%"}, ConfigError, "tiers: is about sharded tables"),
        (
            {"pipeline": {"recompute": "full"}, "optim.tables.lr": 0.5},
            ConfigError,
            "optim.tables: is about sharded tables",
        ),
        ({"pipeline": {"slices": 2}, "dynamic": {"token": {}}}, ConfigError, "dynamic: is about sharded tables"),
        (
            {"pipeline": {"slices": 2, "recompute": "selective"}, "model.attention": "pointwise"},
            ConfigError,
            "cannot keep its attention alone",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_before_the_first_step(text, tmp_path, changes, error, told):
    with pytest.raises(error, match=f"(?i){told}"):
        run_ranks(1, refused, Job(tmp_path, text, changes), timeout_s=DEADLINE_S)


def test_a_tied_model_must_be_split_over_its_stages(text, tmp_path):
    job = Job(tmp_path, text, {"pipeline": CUT, "model.tied": True})
    with pytest.raises(ScheduleError, match="tied to the embedding, but they are on different ranks"):
        run_ranks(2, refused, job, timeout_s=DEADLINE_S)


def test_a_plan_shows_stages_and_slices(text, tmp_path):
    job = Job(tmp_path, text, {"pipeline": {**CUT, "chunks": 1, "slices": 7}})
    line = pipeline_line(job.config(2), Dataset.open(text))
    assert "1 pipeline(s) of 2 ranks x 1 chunks, layers by stage [2, 2]" in line
    assert "2 microbatches of slices of [5, 5, 4, 4, 4, 4, 4] tokens" in line
    with pytest.raises(ScheduleError, match="4 layers cannot fill 6 stages"):
        pipeline_line(Job(tmp_path, text, {"pipeline": {**CUT, "chunks": 3}}).config(2), Dataset.open(text))


def mismatched(rank: int, world: int, job: Job) -> None:
    """Each rank of the pipeline believes in another number of microbatches."""
    cut = {**CUT, "microbatches": 2 * rank + 2, "timeout_s": 20}
    refused(rank, world, Job(job.root, job.data, {"pipeline": cut}))


def test_ranks_with_different_settings_are_refused(text, tmp_path):
    with pytest.raises(ScheduleError, match="ranks 1 have another schedule than rank 0"):
        run_ranks(2, mismatched, Job(tmp_path, text), timeout_s=DEADLINE_S)
