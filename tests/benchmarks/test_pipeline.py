"""The pipeline's benchmark: contestants agree, readings are kept and filtered, figures come out of them."""

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.pipeline import memory, prediction, race, speed
from benchmarks.pipeline.clocks import CLEAN, Clock, Reading, is_clean
from benchmarks.pipeline.contestants import Entry, build
from benchmarks.pipeline.model import Size, batch
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.schedule.ops import Kind

SMALL = Size(layers=4, width=16, heads=2, tokens=64, vocabulary=32)
ENTRIES = (
    Entry("plain", "plain"),
    Entry("independent", "independent"),
    Entry("1f1b", "1f1b"),
    Entry("interleaved v2", "interleaved", 2),
    Entry("interleaved v2 deferred", "interleaved", 2, defer=True),
    Entry(speed.OURS, "ours", 2, even_bounds(64, 4)),
    Entry(speed.UNEVEN, "ours", 2, (0, 30, 50, 64)),
)


def small(path, limit_s=0.0):
    return race.Race(SMALL, 2, 2, ENTRIES, 1, limit_s, path, "code")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Readings of one short race."""
    path = tmp_path_factory.mktemp("race") / "samples.jsonl"
    race.hold(replace(small(path, 1.0), rounds=99))
    return path


def test_all_contestants_have_the_loss_and_the_gradients_of_the_plain_model(path):
    found = race.load(small(path))
    assert set(found.agreement) == {entry.name for entry in ENTRIES}
    assert all(one["loss"] < 1e-6 and one["gradients"] < 1e-5 for one in found.agreement.values())


def test_every_operation_has_its_time(path):
    turns = race.load(small(path)).rounds[0]
    stages = {(kind, stage) for kind, stage, _ in turns[speed.OURS].times}
    wanted = {(kind, stage) for kind in (Kind.FORWARD, Kind.BACKWARD) for stage in range(4)} | {(Kind.LOSS, 0)}
    assert stages == wanted == {(kind, stage) for kind, stage, _ in turns["interleaved v2"].times}
    assert len(turns["plain"].ranks) == 1
    assert all(speed.replayed(turns[e.name], e, small(path)) > 0 for e in ENTRIES)


def reading(name, walls, number=0, waits=0.0):
    ranks = [[wall, 1.0 - waits, waits] for wall in walls]
    times = [["F", 0, 0, 0.25]] if name != "plain" else []
    return {"key": "", "round": str(number), "name": name, "ranks": ranks, "times": times}


def written(path, made, entries):
    key = made.key
    path.write_text("".join(json.dumps(entry | {"key": key}) + "\n" for entry in entries) + '{"key": "cut sh')


def test_ratios_are_of_rounds_in_which_both_were_clean(tmp_path):
    made = small(tmp_path / "s")
    rounds = [("1f1b", [1.0, 1.02], 0), (speed.OURS, [1.0], 0), ("1f1b", [9.0], 1), (speed.OURS, [1.0], 1)]
    written(made.samples, made, [reading(*one) for one in rounds])
    found = race.load(made)
    assert found.ratio("1f1b", speed.OURS) == pytest.approx(1.02)
    assert len(found.clean("1f1b")) == 1
    assert len(found.clean(speed.OURS)) == 2


def test_readings_of_other_sources_do_not_count(tmp_path):
    made = small(tmp_path / "s")
    written(made.samples, made, [reading("1f1b", [1.0])])
    assert len(race.load(made).rounds) == 1
    assert race.load(replace(made, code="other")).rounds == []


def test_what_neither_computes_nor_waits_is_a_disturbance():
    assert is_clean([Reading(1.0, 0.5, 0.45), Reading(1.0, 1.0, 0.0)])
    assert not is_clean([Reading(1.0, 1.0, 0.0), Reading(1.0, 0.9 - CLEAN, 0.0)])


def test_a_reading_tells_cpu_from_sleep():
    found = []
    with Clock().reading(found):
        time.sleep(0.05)
    assert found[0].wall > 0.05
    assert found[0].cpu < 0.04
    assert found[0].wait == 0
    assert found[0].disturbed > 0.2


def test_the_formula_holds_for_one_rank():
    case = memory.Case(SMALL, 1, 2, Entry("ours", "ours", 1, even_bounds(64, 4)))
    found = memory._rank(0, 1, case)
    assert found["saved"] == pytest.approx(memory.model_bytes(SMALL), rel=0.03)


def test_what_a_contestant_is_given_stays_the_same():
    one = build(Entry("plain", "plain"), SMALL, 0, 1, 2)
    losses = [one.step(batch(SMALL, 2, 3)) for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(batch(SMALL, 1, 3)[0].inputs, batch(SMALL, 1, 3)[0].inputs)


def test_a_prediction_adds_up_what_operations_take():
    layer = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0}
    samples = {kind: [prediction.Sample(64 // n, 1, s / n) for n in (1, 2, 4)] for kind, s in layer.items()}
    made = race.Race(SMALL, 1, 2, (), 1, 0.0, None, "code")
    seconds = prediction.predict(made, ENTRIES[5], samples, prediction.Link())
    assert seconds == pytest.approx(2 * 4 * 3.0, rel=1e-3)
