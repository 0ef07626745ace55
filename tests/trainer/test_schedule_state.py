"""Learning rates over time, and where a run stands."""

import math

import pytest

from thresher.errors import ConfigError
from thresher.trainer.assemble import total_steps
from thresher.trainer.config import RunConfig, Schedule
from thresher.trainer.folder import RunFolder, flat
from thresher.trainer.loop import step_seed
from thresher.trainer.schedule import factor
from thresher.trainer.state import TrainState
from thresher.zoo.registry import RunConfig as ZooConfig


def config(**changes):
    values = {"name": "t", "data": {"path": "d"}, "model": {"name": "lr"}, "train": {"batch_size": 10}} | changes
    return ZooConfig.model_validate(values)


def test_warm_up_is_linear_and_reaches_one():
    schedule = Schedule(kind="constant", warmup_steps=4)
    assert [factor(schedule, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_ends_at_the_floor():
    schedule = Schedule(kind="linear", warmup_steps=10, floor=0.2)
    assert factor(schedule, 10, 110) == 1.0
    assert math.isclose(factor(schedule, 60, 110), 0.6)
    assert math.isclose(factor(schedule, 110, 110), 0.2)
    assert math.isclose(factor(schedule, 500, 110), 0.2)


def test_cosine_decay_passes_the_middle_at_half():
    schedule = Schedule(kind="cosine", decay_steps=100)
    assert factor(schedule, 0, 1000) == 1.0
    assert math.isclose(factor(schedule, 50, 1000), 0.5)
    assert math.isclose(factor(schedule, 100, 1000), 0.0, abs_tol=1e-12)


def test_state_keeps_the_best_and_counts_stale_evaluations():
    state = TrainState().stepped(10).evaluated({"auc": 0.7}, "auc", 0.0)
    assert (state.best_step, state.cursor) == (1, 10)
    worse = state.stepped(10).evaluated({"auc": 0.6}, "auc", 0.0)
    assert (worse.best_step, worse.stale_evals, worse.best_metrics) == (1, 1, {"auc": 0.7})
    assert state.stepped(10).evaluated({"auc": 0.7}, "auc", 0.0).stale_evals == 1
    better = worse.stepped(10).evaluated({"auc": 0.8}, "auc", 0.0)
    assert (better.best_step, better.stale_evals) == (3, 0)


def test_state_takes_a_smaller_loss_as_better_and_heeds_min_delta():
    state = TrainState().stepped(1).evaluated({"logloss": 0.5}, "logloss", 0.0)
    assert state.stepped(1).evaluated({"logloss": 0.4}, "logloss", 0.0).best_step == 2
    assert state.stepped(1).evaluated({"logloss": 0.49}, "logloss", 0.05).stale_evals == 1


def test_an_undefined_metric_is_no_improvement():
    state = TrainState().stepped(1).evaluated({"auc": 0.5}, "auc", 0.0)
    assert state.stepped(1).evaluated({"auc": math.nan}, "auc", 0.0).best_step == 1
    first = TrainState().stepped(1).evaluated({"auc": math.nan}, "auc", 0.0)
    assert first.best_step == -1


def test_without_a_stopping_metric_the_first_one_counts():
    state = TrainState().stepped(1).evaluated({"hr@10": 0.1, "mrr": 0.9}, "", 0.0)
    assert state.stepped(1).evaluated({"hr@10": 0.2, "mrr": 0.1}, "", 0.0).best_step == 2


def test_an_unknown_stopping_metric_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"eval\.early_stop\.metric.*'acu'.*Did you mean 'auc'"):
        TrainState().evaluated({"auc": 0.5, "logloss": 0.1}, "acu", 0.0)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "rows", "steps"), [(1, 0, 100, 10), (0.5, 0, 100, 5), (2, 7, 100, 7), (1, 0, 109, 10)]
)
def test_total_steps(epochs, max_steps, rows, steps):
    train = {"batch_size": 10, "epochs": epochs, "max_steps": max_steps}
    assert total_steps(config(train=train), rows) == steps


def test_too_few_rows_for_one_batch_are_refused():
    with pytest.raises(ConfigError, match=r"train\.batch_size: 1 epochs of 9 rows do not fill one batch of 10"):
        total_steps(config(), 9)


def test_step_seeds_differ_by_step_and_rank_and_fit_torch():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_run_goes_on_with_more_steps_but_not_with_another_rate(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.require_same(config())
    folder.write_config(config())
    folder.require_same(config(train={"batch_size": 10, "epochs": 3}, launch={"processes": 2}))
    with pytest.raises(ConfigError, match=r"optim\.dense\.lr was 0\.001, is 0\.5") as caught:
        folder.require_same(config(optim={"dense": {"lr": 0.5}}))
    assert "run_dir" in caught.value.fix


def test_a_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match=r"run: cannot be made a run directory.*set run_dir|Set run_dir"):
        RunFolder(tmp_path / "run").create()


def test_flat_keeps_lists_and_empty_mappings_as_values():
    assert flat({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": 1, "a.c": {}, "d": [1, 2]}


def test_configuration_is_generic_over_models():
    assert issubclass(ZooConfig, RunConfig)
