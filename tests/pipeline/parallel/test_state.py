"""A checkpoint of one cut of a model loads into any other one, to the last bit, optimizer state included."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.multi.harness import run_ranks
from tests.pipeline.parallel.twin import Setting, begin, train
from tests.pipeline.runtime.tiny import Tiny
from thresher.pipeline.parallel.state import ModelState, OptimizerState, named
from thresher.pipeline.vocabulary.rows import row_range
from thresher.trainer.checkpoint.store import CheckpointStore

SAVED = Setting("replicated", 2, 1, build=Tiny(layers=4, dtype=torch.float32))


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def saved(rank, world, setting, folder):
    """Trains, saves, and tells the whole of what this process holds, and a loss."""
    run = train(setting, adam)
    state = {"model": ModelState(run.dense), "optimizer": OptimizerState(run.dense)}
    CheckpointStore(Path(folder), keep=1).save(1, state, {})
    return held(run.dense) | told(run)


def loaded(rank, world, setting, folder):
    """Loads into a model that differs and has been used, and tells what this process holds, and a loss."""
    run = begin(setting, adam)
    run.step(0)
    run.evaluated()
    state = {"model": ModelState(run.dense), "optimizer": OptimizerState(run.dense)}
    assert CheckpointStore(Path(folder), keep=1).restore(state) is not None
    loss = told(run)
    return held(run.dense) | loss


def told(run):
    """The loss, among what is held."""
    return {("loss", ""): (0, torch.tensor(run.evaluated()))}


def held(dense):
    """Weights and optimizer state by name and key: (first row, values)."""
    parts, state, found = dense.parts, dense.state(), {}
    for name, tensor in named(parts).items():
        cut = name in ("embedding.weight", "head.weight") and len(tensor) < parts.vocabulary
        first = row_range(parts.vocabulary, dense.mesh.stages, dense.mesh.rank)[0] if cut else 0
        for key, value in {"weight": tensor, **state.get(tensor, {})}.items():
            found[name, key] = (first if value.dim() else 0, whole(value))
    return found


def whole(value):
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def joined(results):
    """Of all processes: whole tensors by name and key; replicas must agree."""
    rows: dict = {}
    for result in results:
        for key, (first, value) in result.items():
            seen = rows.setdefault(key, {}).setdefault(first, value)
            assert torch.equal(seen, value), key
    return {
        key: torch.cat([pieces[first] for first in sorted(pieces)]) if len(pieces) > 1 else pieces[0]
        for key, pieces in rows.items()
    }


def compare(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        tolerance = 1e-6 if key[0] == "loss" else 0
        torch.testing.assert_close(value, after[key], rtol=tolerance, atol=0, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("tied", "cuts"), [(False, [(1, 3), (2, 2)]), (True, [(1, 2)])])
def test_a_checkpoint_loads_into_other_stages_and_chunks(tmp_path, tied, cuts):
    build = Tiny(layers=4, tied=tied, dtype=torch.float32)
    before = joined(run_ranks(2, saved, Setting("replicated", 2, 1, build=build), str(tmp_path), timeout_s=60))
    assert ("layers.3.project.weight", "exp_avg") in before
    assert ("head.weight", "weight") in before or tied
    for stages, chunks in cuts:
        setting = Setting("replicated", stages, chunks, build=build)
        compare(before, joined(run_ranks(stages, loaded, setting, str(tmp_path), timeout_s=60)))


@pytest.mark.slow
def test_a_checkpoint_of_sharded_layers_loads_into_replicated_ones_and_back(tmp_path):
    sharded = Setting("sharded", 2, 1, build=SAVED.build)
    before = joined(run_ranks(4, saved, sharded, str(tmp_path), timeout_s=90))
    whole = Setting("replicated", 1, 1, build=SAVED.build, split=False)
    compare(before, joined(run_ranks(1, loaded, whole, str(tmp_path), timeout_s=60)))
    back = Setting("sharded", 1, 2, build=SAVED.build)
    compare(before, joined(run_ranks(2, loaded, back, str(tmp_path), timeout_s=60)))


@pytest.mark.slow
def test_a_checkpoint_of_deepspeed_loads_into_replicated_layers_and_back(tmp_path):
    """Slow: DeepSpeed builds a native part at its first use."""
    zero = Setting("zero", 1, 2, build=SAVED.build)
    before = joined(run_ranks(2, saved, zero, str(tmp_path), timeout_s=90))
    compare(before, joined(run_ranks(2, loaded, SAVED, str(tmp_path), timeout_s=60)))
    compare(before, joined(run_ranks(4, loaded, Setting("zero", 2, 1, build=SAVED.build), str(tmp_path), timeout_s=90)))


def unsaved(rank, world):
    """State before the first step is none, and loads as none into an optimizer that has some."""
    fresh, run = begin(SAVED, adam), train(SAVED, adam)
    nothing = OptimizerState(fresh.dense).state_dict()
    assert OptimizerState(run.dense).prepare({}, {}) == nothing == {"state": {}}
    return len(run.dense.state())


def test_parameters_without_state_have_none_after_loading():
    assert run_ranks(2, unsaved, timeout_s=60) == [0, 0]
