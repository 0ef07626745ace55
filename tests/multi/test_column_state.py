"""Row-wise state of tables cut by columns: one scalar a row, shown once, alike on all shards, also after loading."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from tests.multi.harness import run_ranks
from tests.multi.sharded_twin import SEED, Case, local_parts, plan_of
from tests.multi.twin import Net, samples
from thresher.embeddings.rows.flat import FlatTable
from thresher.errors import PlanError
from thresher.sharding.model import ShardedModel, shard

KEY = "inner.mean.embedding_bags.mean.weight"


def _model(case: Case, world: int, local_world: int, seed: int = SEED) -> ShardedModel:
    plan = plan_of(case, world, local_world)
    return shard(Net(), plan, device=torch.device("cpu"), optimizer=case.table_optimizer, seed=seed)


def _train(model: ShardedModel, rank: int, world: int, first: int, last: int) -> None:
    for sample in samples(last)[first:]:
        kjt, labels = sample.part(rank, world)
        (model.wrapped(kjt) * (labels - 0.4)).sum().backward()
        model.step_tables()


def _scalars(model: ShardedModel) -> dict[tuple[str, int, int], Tensor]:
    tables = [table for table in model.tables() if isinstance(table.storage, FlatTable)]
    return {(table.path, table.row0, table.col0): table.storage.scalar.clone() for table in tables}


def shapes_and_scalars(rank: int, world: int, local_world: int, case: Case) -> tuple[list[int], list[int], Any]:
    """Size of a state, rows of its local shards, and all local scalars after some steps."""
    model = _model(case, world, local_world)
    _train(model, rank, world, 0, 4)
    state = model.table_optimizer.state_dict()["state"]
    shown = state[KEY]["mean.momentum1"] if KEY in state else None
    assert shown is None or isinstance(shown, ShardedTensor)
    local = [] if shown is None else [shard.tensor.numel() for shard in shown.local_shards()]
    return [] if shown is None else list(shown.size()), local, _scalars(model)


def resumed(rank: int, world: int, local_world: int, case: Case) -> bool:
    """Whether a fresh model that loads weights and state goes on as the one they are of."""
    one, two = _model(case, world, local_world), _model(case, world, local_world, seed=77)
    _train(one, rank, world, 0, 4)
    two.wrapped.load_state_dict(copy.deepcopy(_plain(one.wrapped.state_dict())))
    dense = dict(one.dense_parameters())
    for name, parameter in two.dense_parameters().items():
        parameter.data.copy_(dense[name].data)
    _into(two.table_optimizer.state_dict()["state"], one.table_optimizer.state_dict()["state"])
    two.table_optimizer.load_state_dict(two.table_optimizer.state_dict())
    for model in (one, two):
        _train(model, rank, world, 4, 8)
    left, right = local_parts(one), local_parts(two)
    same = [torch.equal(a[2], b[2]) for path in left for a, b in zip(left[path], right[path], strict=True)]
    scalars, others = _scalars(one), _scalars(two)
    return all(same) and all(torch.equal(scalars[key], others[key]) for key in scalars)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return dict(state)


def _into(target: dict[str, Any], source: dict[str, Any]) -> None:
    """What a checkpoint does: copies each rank's shards in place."""
    for key, states in source.items():
        for name, value in states.items():
            if isinstance(value, ShardedTensor):
                pairs = zip(target[key][name].local_shards(), value.local_shards(), strict=True)
                for left, right in pairs:
                    left.tensor.copy_(right.tensor)
            else:
                target[key][name].copy_(value)


def test_exact_scalars_are_shown_once_and_are_alike_on_all_shards() -> None:
    first, second = run_ranks(2, shapes_and_scalars, 2, Case("column_wise", "rowwise_adagrad"), timeout_s=60)
    assert [first[0], first[1], second[1]] == [[10], [10], []]
    for (path, row0, _), scalar in first[2].items():
        twins = [other for (p, r, _), other in second[2].items() if (p, r) == (path, row0)]
        assert scalar.any()
        assert all(torch.equal(scalar, twin) for twin in twins)


def test_separate_scalars_follow_each_other_as_in_torchrec() -> None:
    case = Case("column_wise", "rowwise_adagrad", "separate")
    first, second = run_ranks(2, shapes_and_scalars, 2, case, timeout_s=60)
    assert [first[0], first[1], second[1]] == [[20], [10], [10]]


def test_scalars_reach_all_column_shards_after_loading() -> None:
    case = Case("grid_shard", "rowwise_adagrad")
    assert run_ranks(4, resumed, 2, case, timeout_s=90, local_world=2) == [True] * 4


def test_the_count_of_updates_of_adam_is_loaded() -> None:
    assert run_ranks(2, resumed, 2, Case("mixed", "rowwise_adam"), timeout_s=90) == [True] * 2


def several(rank: int, world: int) -> list[float]:
    """Models with other sets of ranks that share rows, one after the other in one process."""
    found = []
    for kind in ("table_column_wise", "grid_shard", "column_wise", "table_column_wise"):
        model = _model(Case(kind, "rowwise_adagrad"), world, 2)
        _train(model, rank, world, 0, 2)
        found.append(float(sum(scalar.sum() for scalar in _scalars(model).values())))
    return found


def test_ranks_may_belong_to_different_numbers_of_groups() -> None:
    totals = torch.tensor(run_ranks(4, several, timeout_s=90, local_world=2))
    assert bool(totals.sum(0).gt(0).all())


def part_of_the_job(rank: int, world: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    case = Case("column_wise", "rowwise_adagrad")
    plan = plan_of(case, 2, 2)
    shard(Net(), plan, device=torch.device("cpu"), optimizer=case.table_optimizer, seed=0, group=groups[rank // 2])


def test_exact_scalars_need_all_ranks_of_the_job() -> None:
    with pytest.raises(PlanError, match=r"over 2 ranks of 4.*set column_state of the optimizer to separate"):
        run_ranks(4, part_of_the_job, timeout_s=60, local_world=2)
