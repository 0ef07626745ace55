"""Delays change nothing; a dead rank, a missing message and mismatched ranks are told by name within the deadline."""

import os
import random
import signal
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import torch

from tests.multi.harness import run_ranks
from tests.pipeline.runtime.test_equality import CPU, global_names
from tests.pipeline.runtime.tiny import SEED, Layer, Tiny, padded
from thresher.errors import BadIds, ConfigError, PipelineStalled, ScheduleError
from thresher.pipeline.layout import Layout
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import build_parts
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.ops import Kind

LIMIT_S = 3


class Delays:
    """Sleeps up to 3 ms before every operation."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def before(self, op):
        time.sleep(self.random.random() * 0.003)

    def after(self, op):
        pass


class Death:
    """Kills its process at the ``count``-th operation of a kind."""

    def __init__(self, kind, count):
        self.kind, self.left = kind, count

    def before(self, op):
        self.left -= op.kind is self.kind
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, op):
        pass


class Nap(Death):
    """Sleeps there for longer than the deadline instead."""

    def before(self, op):
        self.left -= op.kind is self.kind
        if self.left == 0:
            time.sleep(LIMIT_S + 3)


def made(rank, world, observer=None, limit_s=60, build=None, options=None, **settings):
    chosen = {"stages": world, "chunks": 2, "microbatches": 2, "slices": 4, "split_head": True} | settings
    schedule = build_schedule(**chosen)
    parts = build_parts(build or Tiny(), schedule.shape, rank, CPU)
    limit = timedelta(seconds=limit_s)
    groups = make_groups(schedule, [range(world)], limit) if world > 1 else None
    return PipelineRuntime(
        schedule, parts, groups, RuntimeOptions(**{"timeout": limit, "seed": SEED} | (options or {})), observer
    )


def delayed(rank, world, seeds):
    runtime, answers = made(rank, world), []
    for seed in seeds:
        runtime.observer = Delays(seed * world + rank)
        runtime.parts.zero_grad()
        outcome = runtime.step(padded(2, 4))
        answers.append((float(outcome.loss), [p.grad.clone() for _, p in global_names(runtime.parts)]))
    return all(loss == answers[0][0] and all(map(torch.equal, found, answers[0][1])) for loss, found in answers[1:])


def test_delays_change_no_bit():
    assert all(run_ranks(2, delayed, range(6), timeout_s=60))


@pytest.mark.slow
def test_50_runs_with_delays_change_no_bit():
    assert all(run_ranks(4, delayed, range(50), timeout_s=250))


def with_a_victim(rank, world, fault):
    runtime = made(rank, world, fault if rank == 1 else None, LIMIT_S)
    started = time.monotonic()
    try:
        runtime.step(padded(2, 4))
    except PipelineStalled as error:
        return time.monotonic() - started, str(error)
    return None


def survivors(rank, world, fault, folder):
    """What the rank met, in a file: a killed rank ends the others' chance to answer."""
    answer = with_a_victim(rank, world, fault)
    (folder / f"{rank}").write_text(repr(answer))


@pytest.mark.parametrize("kind", [Kind.FORWARD, Kind.BACKWARD, Kind.SEND])
def test_every_other_rank_names_what_a_killed_rank_owes(kind, tmp_path):
    with pytest.raises(Exception, match=r"ended without a result|Stalled|by peer"):
        run_ranks(3, survivors, Death(kind, 3), tmp_path, timeout_s=60)
    for rank in (0, 2):
        for _ in range(50):
            if (tmp_path / f"{rank}").exists():
                break
            time.sleep(0.1)
        seconds, message = eval((tmp_path / f"{rank}").read_text())
        assert seconds < LIMIT_S + 2
        assert f"rank {rank}, " in message
        assert "microbatch" in message


def test_a_rank_that_hangs_is_named_with_what_it_owes():
    found = run_ranks(2, with_a_victim, Nap(Kind.FORWARD, 3), timeout_s=60)
    seconds, message = found[0]
    assert LIMIT_S - 1 < seconds < LIMIT_S + 2
    assert "from rank 1" in message
    assert "of microbatch 0, chunk" in message


def mismatched(rank, world, settings, build):
    try:
        runtime = made(rank, world, None, 20, build[rank], **settings[rank])
        runtime.step(padded(2, 4))
    except ScheduleError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("settings", "build", "told"),
    [
        (({}, {"slack": 1}), (Tiny(), Tiny()), "have another schedule than rank 0"),
        (({}, {}), (Tiny(), Tiny(dtype=torch.float32)), "have another width, depth, vocabulary or dtype of the model"),
        (({}, {}), (Tiny(), Tiny(layers=9)), "have another width, depth, vocabulary or dtype of the model"),
        (({}, {}), (Tiny(), Tiny(vocabulary=24)), "have another width, depth, vocabulary or dtype of the model"),
        (({"split_embedding": True},) * 2, (Tiny(), Tiny(tied=True)), "have another output layer"),
        (({"options": {"recompute": "full"}}, {}), (Tiny(), Tiny()), "have another recompute, autocast or seed"),
        (({"options": {"autocast": torch.bfloat16}}, {}), (Tiny(), Tiny()), "have another recompute, autocast or seed"),
        (({"options": {"seed": 1}}, {}), (Tiny(), Tiny()), "have another recompute, autocast or seed"),
    ],
)
def test_ranks_that_differ_are_refused_before_the_first_step(settings, build, told):
    for message in run_ranks(2, mismatched, settings, build, timeout_s=60):
        assert "ranks 1" in message
        assert told in message


def other_microbatches(rank, world):
    runtime, told = made(rank, world, None, 20), []
    tokens = [replace(m, inputs=(m.inputs + rank) % 7) for m in padded(2, 4)]
    for given in (padded(2, 4, tokens=24 + 4 * rank), tokens):
        try:
            runtime.step(given)
        except ScheduleError as error:
            told.append(str(error))
    return told


def test_ranks_with_other_microbatches_are_refused():
    for told in run_ranks(2, other_microbatches, timeout_s=60):
        assert len(told) == 2
        assert all("ranks 1 have another layout, tokens" in message for message in told)


def single(**settings):
    return made(0, 1, **settings)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda m: m[:1], "1 microbatches were given, the schedule has 2"),
        (lambda m: padded(2, 2), "cut into 2 slices, the schedule has 4"),
        (lambda m: [m[0], replace(m[1], layout=Layout((0, 8, 8, 16, 24), 2))], "do not fill 4 slices"),
        (lambda m: [m[0], replace(m[1], layout=Layout((0, 6, 12, 18, 24), 2, (0, 5, 5)))], "a sequence of no tokens"),
        (lambda m: [m[0], replace(m[1], layout=Layout((0, 6, 12, 18, 24), 2, (0, 5)))], "2 rows of packed sequences"),
        (lambda m: [m[0], replace(m[1], targets=m[1].targets[:, :5])], "targets have shape"),
        (lambda m: padded(1, 4) + padded(1, 4, vectors=True), "some inputs are ids and some vectors"),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(given, told):
    with pytest.raises(ScheduleError, match=told):
        single().step(given(padded(2, 4)))


class Failure(Death):
    """Raises there instead."""

    def before(self, op):
        self.left -= op.kind is self.kind
        if self.left == 0:
            raise KeyError("no such thing")


def test_a_step_that_failed_is_the_last():
    runtime = single(observer=Failure(Kind.BACKWARD, 2))
    with pytest.raises(ScheduleError):
        runtime.step(padded(1, 4))  # refused before anything ran: this one does not count
    with pytest.raises(KeyError):
        runtime.step(padded(2, 4))
    for again in (runtime.step, runtime.evaluate):
        with pytest.raises(ScheduleError, match="an earlier step ended with an error"):
            again(padded(2, 4))


class Twice(Layer):
    def forward(self, values, context):
        return super().forward(super().forward(values, context), context)


@dataclass(frozen=True)
class Doubled(Tiny):
    def layer(self, index):
        return self._seeded(index, lambda: Twice(index, self.pointwise, self.drop))


@pytest.mark.parametrize("pointwise", [False, True])
def test_a_layer_that_attends_twice_is_refused(pointwise):
    with pytest.raises(ConfigError, match="layer 0 attends twice"):
        single(build=Doubled(pointwise=pointwise)).step(padded(2, 4))


def test_ids_outside_the_vocabulary_are_refused():
    microbatches = padded(2, 4)
    microbatches[1].inputs[1, 2] = 23
    with pytest.raises(BadIds, match=r"microbatch 1, slice 0, row 1, token 2: input 23 is outside 0\.\.22"):
        single().step(microbatches)


def test_vectors_are_refused_where_embeddings_are_looked_up():
    with pytest.raises(ScheduleError, match="inputs are vectors, but the schedule looks up embeddings"):
        single(split_embedding=True).step(padded(2, 4, vectors=True))


def test_too_few_layers_are_refused():
    with pytest.raises(ScheduleError, match="3 layers cannot fill 4 stages"):
        single(chunks=4, build=Tiny(layers=3))


def test_a_tied_output_layer_on_another_rank_is_refused():
    shape = build_schedule(2, 1, 2, 4).shape
    with pytest.raises(ScheduleError, match="tied to the embedding"):
        build_parts(Tiny(tied=True), shape, 0, CPU)


def many_steps(rank, world, steps):
    runtime, live = made(rank, world), []
    for step in range(steps):
        runtime.step(padded(2, 4), step=step)
        live.append((runtime.ledger.live.total(), runtime.ledger.peak))
    return live


def test_nothing_is_left_after_a_step():
    for live in run_ranks(2, many_steps, 4, timeout_s=60):
        assert all(left == 0 for left, _ in live)
        assert live[0][1] == live[-1][1] > 0


def evaluations(rank, world, counts):
    """The most bytes on their way out at once."""
    peaks = []
    for count in counts:
        runtime = made(rank, world, microbatches=count)
        runtime.evaluate(padded(count, 4))
        peaks.append(runtime.ledger.peaks["sending"])
    return peaks


def test_an_evaluation_of_more_microbatches_holds_no_more():
    for few, many in run_ranks(2, evaluations, (2, 8), timeout_s=60):
        assert 0 < many <= 1.2 * few


def test_offload_is_refused_where_memory_is_the_hosts_already():
    schedule = build_schedule(1, 1, 1, 2)
    parts = build_parts(Tiny(), schedule.shape, 0, CPU)
    with pytest.raises(ConfigError, match="in host memory already"):
        PipelineRuntime(schedule, parts, None, RuntimeOptions(offload=0.5))
