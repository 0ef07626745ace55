"""Training with tiers, saved on one plan and gone on with on another: equal to the run that was not interrupted.

The model's gradients do not depend on its rows and are sums of small multiples of powers of two (``tiers_twin``), so
whatever ranks hold a table, its rows come out the same to the last bit, but where its columns are cut or joined.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.multi.harness import run_ranks
from tests.multi.tiers_twin import BATCH, SEED, STEPS, Case, Net, Outcome, assembled, outcome, samples, sharded, step
from thresher.embeddings.optimizers import TableOptimizer
from thresher.errors import CheckpointError
from thresher.sharding.model import shard
from thresher.sharding.planner import make_plan
from thresher.trainer.checkpoint import CheckpointStore, State, TableState, model_state

SAVED = STEPS // 2
PATHS = ["bags.shared", "bags.alone", "bags.plain", "heavy.weighted", "single.item"]
Place = tuple[str, str, int, int]
"""Sharding types of pooled tables and of the one of single ids, ranks, ranks of each machine."""


def train(
    rank: int, world: int, local_world: int, folder: str, case: Case, load: bool, until: int, save: bool
) -> Outcome:
    """Goes on from the checkpoint in ``folder``, or begins; saves at the end."""
    model = sharded(world, local_world, case)
    state: State = {"model": model_state(model), "table_optimizer": TableState(model)}
    store, first = CheckpointStore(Path(folder), 1), 0
    if load:
        found = store.restore(state)
        assert found is not None
        first = found.step
    size = BATCH // world
    for sample in samples(STEPS)[first:until]:
        step(model, sample, slice(rank * size, (rank + 1) * size), world)
    if save:
        store.save(until, state, {})
    return outcome(model)


def run(folder: Path, place: Place, optimizer: str, load: bool, until: int, save: bool = False) -> list[Outcome]:
    kind, single, world, local = place
    case = Case(kind, single, optimizer)
    return run_ranks(world, train, local, str(folder), case, load, until, save, timeout_s=240, local_world=local)


def assert_same(left: list[Outcome], right: list[Outcome], exact: bool) -> None:
    """Scalars and priorities always. Other column shards round to other scales, and their headers move thresholds."""
    for path in PATHS:
        one, two = assembled(left, path), assembled(right, path)
        assert torch.equal(one.stat, two.stat), path
        if exact or path == "bags.plain":
            assert torch.equal(one.tier, two.tier), path
            assert torch.equal(one.values, two.values), path
        else:
            assert (one.tier == two.tier).float().mean() > 0.97, path
            assert (one.values - two.values).abs().mean() < 0.08 * two.values.abs().mean(), path


TW: Place = ("table_wise", "table_wise", 2, 2)
RW: Place = ("row_wise", "row_wise", 2, 2)
CW: Place = ("column_wise", "column_wise", 2, 2)
ONE: Place = ("table_wise", "table_wise", 1, 1)
GRID: Place = ("grid_shard", "row_wise", 4, 2)
RW4: Place = ("row_wise", "row_wise", 4, 4)

QUICK = [
    (TW, RW, "rowwise_adagrad"),
    (RW, ONE, "rowwise_adam"),
    (CW, CW, "rowwise_adagrad"),
]
LONG = [
    (RW, TW, "ftrl"),
    (ONE, RW, "adam"),
    (TW, CW, "rowwise_adagrad"),
    (CW, RW, "rowwise_adagrad"),
    (GRID, RW4, "rowwise_adagrad"),
    (RW4, GRID, "rowwise_adam"),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]


@pytest.mark.parametrize(("place", "other", "optimizer"), CASES)
def test_a_run_goes_on_in_another_plan_as_if_nothing_had_happened(
    tmp_path: Path, place: Place, other: Place, optimizer: str
) -> None:
    run(tmp_path, place, optimizer, load=False, until=SAVED, save=True)
    resumed = run(tmp_path, other, optimizer, load=True, until=STEPS)
    straight = run(tmp_path, other, optimizer, load=False, until=STEPS)
    columns = {"column_wise", "grid_shard"}
    exact = place[0] == other[0] or not {place[0], other[0]} & columns
    assert_same(resumed, straight, exact)
    assert len({int(n) for part in resumed for t in part.parts.values() for p in t for n in p.tier.unique()}) > 3


def load_without(rank: int, world: int, folder: str) -> dict[str, Tensor]:
    """Weights by table of a model without tiers and with another seed, on one rank."""
    optimizer = TableOptimizer(lr=0.25)
    plan = make_plan(Net(), world=1, local_world=1, device="cpu", optimizer=optimizer, default="table_wise")
    model = shard(Net(), plan, device=torch.device("cpu"), optimizer=optimizer, seed=SEED + 1)
    weights, store = {"model": model_state(model)}, CheckpointStore(Path(folder), 1)
    with pytest.raises(CheckpointError, match=r"was saved with tiers, this run is without them. Go on with the tiers"):
        store.restore({**weights, "table_optimizer": TableState(model)})
    store.restore(weights)
    found = model.wrapped.state_dict()
    return {key.split(".")[-2]: value.local_shards()[0].tensor.clone() for key, value in found.items()}


def test_the_weights_load_into_a_model_without_tiers(tmp_path: Path) -> None:
    before = run(tmp_path, TW, "rowwise_adagrad", load=False, until=SAVED, save=True)
    (flat,) = run_ranks(1, load_without, str(tmp_path), timeout_s=240)
    for path in PATHS:
        assert torch.equal(flat[path.rpartition(".")[2]], assembled(before, path).values), path
