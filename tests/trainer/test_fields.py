"""Fields are scored, dropped and taken back in whole runs, and the run's state knows of it."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.multi.harness import run_ranks
from tests.trainer.test_run import DEADLINE_S, Job, data, here, measure, records, root, run  # noqa: F401
from thresher.data.dataset import Dataset
from thresher.errors import ConfigError
from thresher.launch.field_views import show_fields
from thresher.trainer.assemble import assemble
from thresher.trainer.config import load_config
from thresher.trainer.report.run import Run
from thresher.trainer.run import restore
from thresher.trainer.smaller import useless_fields, without_fields, write_smaller
from thresher.zoo.registry import RunConfig

SCORED = {"fields.score_every": 5, "fields.look_every": 1, "train.max_steps": 20, "data.test": ""}
DROPPED = SCORED | {
    "fields.rounds": 2,
    "fields.finetune_steps": 4,
    "fields.tolerance": 0.5,
    "fields.protect": ["sparse_0"],
    "sharding.default": "row_wise",
}
WITHOUT = {"train.max_steps": 20, "data.test": ""}


def other(root: Path, tmp_path_factory) -> Path:  # noqa: F811
    found = tmp_path_factory.mktemp("other")
    (found / "data").symlink_to((root / "data").resolve())
    return found


def events(root: Path) -> list[tuple[int, str]]:  # noqa: F811
    return [(record["step"], record["event"]) for record in records(root, "fields")]


def released(rank: int, world: int, job: Job) -> dict[str, bool]:
    """After a resume: which tables gave their memory back."""
    parts = assemble(job.config(world), here(rank, world), Dataset.open(job.root / "data"))
    restore(parts)
    return {table.path: table.storage.released for table in parts.sharded.tables()}


def a_smaller_run_reads_none_of(root: Path, dropped: tuple[str, ...]) -> None:  # noqa: F811
    useless = useless_fields(Run.read(root / "run"))
    assert set(useless.names) == set(dropped)
    out = root / "smaller.yaml"
    write_smaller(Run.read(root / "run"), useless.names, out)
    config = load_config(RunConfig, out)
    everything = {"sparse_0", "sparse_1", "sparse_2", "sparse_3", "many_0", "history_0"}
    assert set(config.model.features) == everything - set(dropped) | {f"dense_{n}" for n in range(4)}
    assert not config.fields.enabled
    keys = config.model.build(Dataset.open(root / "data").schema, torch.device("meta")).tables.keys
    assert set(keys) == everything - set(dropped)
    with pytest.raises(ConfigError, match="is there already"):
        write_smaller(Run.read(root / "run"), useless.names, out)
    with pytest.raises(ConfigError, match="no field would be left"):
        without_fields(Run.read(root / "run"), tuple(everything))
    with pytest.raises(ConfigError, match="the model reads no field 'sparse_9'"):
        without_fields(Run.read(root / "run"), ("sparse_9",))


def test_scoring_changes_nothing_in_training(root, tmp_path_factory):  # noqa: F811
    twin = other(root, tmp_path_factory)
    (scored,) = run_ranks(1, run, Job(root, SCORED), timeout_s=DEADLINE_S)
    (plain,) = run_ranks(1, run, Job(twin, WITHOUT), timeout_s=DEADLINE_S)
    for name, weight in plain.weights.items():
        assert torch.equal(weight, scored.weights[name]), name
    found = records(root, "fields")
    assert events(root) == [(step, "scores") for step in (5, 10, 15, 20)]
    assert all(value > 0 for value in found[-1]["scores"].values())
    assert all(error > 0 for error in found[-1]["errors"].values())
    assert not records(twin, "fields")
    with pytest.raises(ConfigError, match="fields were not scored in this run"):
        useless_fields(Run.read(twin / "run"))


def test_fields_are_dropped_round_by_round_and_their_tables_released(root):  # noqa: F811
    job = Job(root, DROPPED)
    run_ranks(2, run, job, timeout_s=DEADLINE_S)
    assert events(root) == [
        (5, "scores"),
        (5, "drop"),
        (9, "keep"),
        (10, "scores"),
        (10, "drop"),
        (14, "keep"),
        (15, "scores"),
        (20, "scores"),
    ]
    found = records(root, "fields")
    first, second = found[1]["changed"], found[4]["changed"]
    assert [len(first), len(second)] == [1, 1]
    assert found[-1]["dropped"] == {first[0]: 5, second[0]: 10}
    ranked = sorted(found[0]["scores"], key=found[0]["scores"].get)
    assert first[0] == next(name for name in ranked if name != "sparse_0")
    assert found[-1]["table_bytes"] < found[-1]["all_bytes"]
    assert found[-1]["scores"][first[0]] == found[0]["scores"][first[0]]
    page = (root / "run" / "report.html").read_text()
    assert f"dropped {first[0]}, on trial for 4 steps" in page
    assert "Score of each field" in page
    a_smaller_run_reads_none_of(root, (*first, *second))
    idle = {path for path, gone in run_ranks(2, released, job, timeout_s=DEADLINE_S)[0].items() if gone}
    assert len(idle) == sum(not name.startswith("history") and name != "sparse_0" for name in (*first, *second))


def test_fields_that_are_missed_are_taken_back(root):  # noqa: F811
    strict = DROPPED | {"fields.tolerance": 0.0, "fields.fields_per_round": 5, "fields.finetune_steps": 2}
    strict |= {"fields.metric": "auc", "fields.start_after": 80, "train.epochs": 3, "train.max_steps": 95}
    run_ranks(1, run, Job(root, strict), timeout_s=DEADLINE_S)
    found = records(root, "fields")
    assert events(root)[:3] == [(85, "scores"), (85, "drop"), (87, "restore")]
    assert not found[2]["dropped"]
    assert found[2]["value"] < found[2]["reference"]
    assert "drop" not in [event for _, event in events(root)[3:]]


def test_a_dry_run_drops_nothing(root, capsys):  # noqa: F811
    run_ranks(1, run, Job(root, SCORED | {"fields.rounds": 3, "fields.dry_run": True}), timeout_s=DEADLINE_S)
    found = records(root, "fields")
    show_fields(root / "run", None)
    assert f"useless: {', '.join(found[-1]['changed'])}" in capsys.readouterr().out
    assert {event for _, event in events(root)} == {"scores", "dry run"}
    assert len(found[-1]["changed"]) == 3
    assert not found[-1]["dropped"]


@pytest.mark.parametrize("tiers", [{}, {"tiers.budget": "80%", "tiers.flat_below_bytes": 0}], ids=["fp32", "tiers"])
def test_a_run_that_died_goes_on_to_the_same_end(root, tmp_path_factory, tiers):  # noqa: F811
    """Its last checkpoint is from the middle of a trial, between two renewals of the means. An evaluation, on another
    number of ranks, knows what was dropped."""
    twin = other(root, tmp_path_factory)
    settings = DROPPED | tiers | {"checkpoint.every_steps": 7, "train.log_every": 1, "data.test": "test"}
    straight = run_ranks(2, run, Job(root, settings), timeout_s=DEADLINE_S)
    shutil.copytree(root / "run", twin / "run")
    for step in (14, 20):
        shutil.rmtree(twin / "run" / "checkpoints" / f"step-{step:08d}")
    resumed = run_ranks(2, run, Job(twin, settings), timeout_s=DEADLINE_S)
    for a, b in zip(resumed, straight, strict=True):
        for name, weight in b.weights.items():
            assert torch.equal(weight, a.weights[name]), name
    assert len(records(twin, "start")) == 2
    for a, b in zip(records(twin, "fields"), records(root, "fields"), strict=True):
        assert {**a, "time": 0} == {**b, "time": 0}
    (again,) = run_ranks(1, measure, Job(root, settings), "test", -1, timeout_s=DEADLINE_S)
    assert again == {k: pytest.approx(v, abs=1e-6) for k, v in records(root, "eval")[-1]["metrics"].items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields.protect": ["sparse_9"]}, "fields.protect: the model has no field 'sparse_9'"),
        ({"fields.budget": "much"}, "fields.budget: 'much' is no budget"),
        ({"fields.bytes_per_round": "0%"}, "fields.bytes_per_round: '0%' allows no byte at all"),
        ({"fields.metric": "acu"}, "fields.metric: 'acu' is not measured"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_the_first_step(root, changes, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        run_ranks(1, run, Job(root, DROPPED | changes), timeout_s=DEADLINE_S)
    assert not (root / "run" / "metrics.jsonl").exists()
