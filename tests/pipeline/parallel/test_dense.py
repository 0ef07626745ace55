"""Replicas of pipelines train as one process does, whichever way their dense state is held."""

import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.multi.harness import run_ranks
from tests.pipeline.parallel.twin import Setting, begin, parts_of, reference, train
from tests.pipeline.runtime.tiny import Tiny
from thresher.errors import ConfigError
from thresher.pipeline.parallel.dense import restart
from thresher.pipeline.parallel.zero import ZeroStage1
from thresher.pipeline.vocabulary.rows import row_range

TABLES = ("embedding.weight", "head.weight")


def trained(rank, world, setting):
    """Weights by global name, with their first row; losses; norms; bytes of optimizer state."""
    run = train(setting)
    parts = run.dense.parts
    values = {}
    for stage in parts.stages:
        for name, parameter in stage.named_parameters():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            values[name] = (whole.detach(), 0)
    first = row_range(parts.vocabulary, setting.stages, run.dense.mesh.rank)[0] if setting.split else 0
    for name in TABLES:
        module = getattr(parts, name.partition(".")[0])
        if module is not None:
            values[name] = (module.weight.detach(), first)
    return values, run.losses, run.norms, _state_numbers(run.optimizer)


def _state_numbers(optimizer):
    """Numbers of optimizer state this process holds."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return sum(_state_numbers(each._inner.optimizer) for each in optimizer.optimizers)
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)


def check(setting, replicas, tolerance):
    results = run_ranks(setting.stages * replicas, trained, setting, timeout_s=100)
    weights, losses, norms = reference(setting, replicas)
    seen = set()
    for values, _, found, _ in results:
        assert found == pytest.approx(norms, rel=tolerance)
        for name, (value, first) in values.items():
            wanted = weights["embedding.weight" if setting.build.tied and name == "head.weight" else name]
            wanted = wanted[first : first + len(value)] if name in TABLES else wanted
            torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
            seen.add(name)
    assert seen >= weights.keys()
    parts = [sum(results[replica * setting.stages][1][step] for replica in range(replicas)) for step in range(3)]
    assert parts == pytest.approx(losses, rel=tolerance)
    return results


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_two_replicas_of_two_stages_train_as_one_process(way):
    check(Setting(way, 2, 2), 2, 1e-10)


def test_layers_sharded_over_replicas_hold_half_of_the_optimizer_state():
    setting = Setting("sharded", 1, 2, split_backward=True)
    whole = sum(p.numel() for name, p in reference(setting, 1)[0].items() if name not in TABLES)
    results = check(setting, 2, 1e-10)
    vocabulary = 2 * setting.build.vocabulary * setting.build.width
    assert sum(numbers for *_, numbers in results) == whole + 2 * vocabulary


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_a_tied_table_counts_once_in_the_norm(way):
    check(Setting(way, 2, 1, build=Tiny(layers=2, tied=True)), 1, 1e-10)


def test_without_a_limit_nothing_is_scaled():
    check(Setting("replicated", 2, 1, build=Tiny(layers=2), split=False, max_norm=math.inf), 1, 1e-10)


@pytest.mark.slow
def test_deepspeed_shards_optimizer_state_and_trains_alike():
    """Slow: DeepSpeed builds a native part at its first use."""
    narrow = Setting("zero", 2, 2, build=Tiny(layers=4, dtype=torch.float32))
    zero = check(narrow, 2, 2e-4)
    whole = run_ranks(4, trained, replace(narrow, way="replicated"), timeout_s=100)
    held = [sum(numbers for *_, numbers in results) for results in (zero, whole)]
    assert 0.5 <= held[0] / held[1] < 0.52


def changed(rank, world):
    """Losses before the shards of gathered layers change, after that, and once that was told."""
    run = begin(Setting("sharded", 1, 1, build=Tiny(layers=1)))
    losses = [run.evaluated()]
    for parameter in run.optimizer.param_groups[0]["params"]:
        if isinstance(parameter, DTensor):
            parameter.detach().to_local().mul_(2)
    losses.append(run.evaluated())
    run.dense.weights_changed()
    return [*losses, run.evaluated()]


def test_layers_stay_gathered_between_evaluations_until_weights_change():
    for before, stale, after in run_ranks(2, changed, timeout_s=60):
        assert before == stale
        assert abs(after - before) > 1e-3


def late(rank, world):
    """How long a replica waits in chunk_done for one that comes three seconds later; the sum is right all the same."""
    run = begin(Setting("replicated", 1, 1, build=Tiny(layers=1)))
    gradient = run.dense.parts.stage(0).front.table.grad = torch.full((64, 16), 1.0 + rank, dtype=torch.float64)
    dist.barrier()
    start = time.monotonic()
    time.sleep(3 * rank)
    run.dense.chunk_done(0)
    waited = time.monotonic() - start
    run.dense.finish()
    assert (gradient == 3).all()
    return waited


def test_replicas_do_not_wait_for_each_other_before_all_chunks_are_done():
    assert run_ranks(2, late, timeout_s=60)[0] < 1.5


def test_deepspeed_is_refused_where_it_would_round_or_is_not_there(monkeypatch):
    _, parts = parts_of(Setting("zero", 1, 1, build=Tiny(layers=1)), 0)
    with pytest.raises(ConfigError, match=r"float32, 'stages\.0\.front\.table' is torch.float64.*Keep parameters in"):
        ZeroStage1(parts, None)
    monkeypatch.setitem(sys.modules, "deepspeed.comm", None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"DeepSpeed cannot be imported.*Install it"):
        ZeroStage1(parts.float(), None)


def test_deepspeed_is_refused_where_its_native_part_cannot_be_built(monkeypatch):
    def unbuilt(*_, **__):
        raise RuntimeError("Ninja is required to load C++ extensions")

    _, parts = parts_of(Setting("zero", 1, 1, build=Tiny(layers=1)), 0)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    for name in ("deepspeed", "deepspeed.comm"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init_distributed=unbuilt))
    with pytest.raises(ConfigError, match=r"cannot build or load its native part: Ninja.*Install a C\+\+ compiler"):
        ZeroStage1(parts.float(), None)


def test_state_that_an_optimizer_made_at_the_beginning_is_kept():
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.Adagrad([first, second], lr=0.1)
    restart(optimizer, [first])
    assert list(optimizer.state) == [first]
    assert first.tolist() == [1.0, 1.0]
    first.grad = torch.ones(2)
    optimizer.step()
    assert first.tolist() == pytest.approx([0.9, 0.9])
