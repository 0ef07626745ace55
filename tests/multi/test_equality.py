"""Sharded training equals plain single-process training: losses and weights, every sharding type, 1, 2 and 4 ranks.

Compared after 20 steps in fp32 with an absolute tolerance of 5e-6 (measured: losses 2.9e-6, weights 3.3e-7 apart;
TorchRec divides means under row cuts by length + 1e-6). Batches hold duplicates, empty bags, ranks whose whole batch is
empty, weights, shared tables, sum and mean pooling in one collection, and a key that no table uses.
"""

from functools import cache

import pytest
import torch

from tests.multi.harness import run_ranks
from tests.multi.sharded_twin import SEED, STEPS, Case, Outcome, assemble, train_all
from tests.multi.twin import Plain, samples
from thresher.sharding.cuts import BAG_TYPES, SEQUENCE_TYPES

TOLERANCE = 5e-6
RANKS = ((1, 1), (2, 2), (2, 1), (4, 2))
"""Ranks, and ranks a machine."""
MACHINE_TYPES = ("table_row_wise", "table_column_wise", "grid_shard")
"""Types to which it matters how ranks spread over machines."""


def cases(world: int, local_world: int) -> list[Case]:
    kinds = MACHINE_TYPES if (world, local_world) == (2, 1) else BAG_TYPES
    found = [Case(kind, "rowwise_adagrad") for kind in kinds]
    return [*found, Case("mixed", "rowwise_adagrad")] if local_world > 1 else found


def further_cases() -> list[Case]:
    """The optimizers that ``cases`` leaves out, on two ranks."""
    others = [Case(kind, name) for name in ("sgd", "adagrad") for kind in BAG_TYPES]
    kinds = ("data_parallel", "row_wise", "column_wise", "grid_shard")
    return others + [Case(kind, name) for name in ("adam", "rowwise_adam", "ftrl") for kind in kinds]


@cache
def outcomes(world: int, local_world: int, further: bool = False) -> dict[Case, list[Outcome]]:
    """All cases of one arrangement, run in one start of its processes; outcomes by rank."""
    todo = further_cases() if further else cases(world, local_world)
    ranks = run_ranks(world, train_all, local_world, todo, timeout_s=240, local_world=local_world)
    return {case: [rank[number] for rank in ranks] for number, case in enumerate(todo)}


@cache
def plain(optimizer: str, parts: int = 1) -> Plain:
    return Plain(Case("table_wise", optimizer).table_optimizer, SEED, parts).train(samples(STEPS))


def assert_equal(ranks: list[Outcome], reference: Plain) -> None:
    torch.testing.assert_close(ranks[0].losses, reference.losses, atol=TOLERANCE, rtol=0)
    for path, weight in reference.tables.items():
        found = assemble(ranks, path, *weight.shape)
        torch.testing.assert_close(found, weight.detach(), atol=TOLERANCE, rtol=0, msg=lambda m, p=path: f"{p}: {m}")
    for outcome in ranks:
        for name, parameter in reference.top.named_parameters():
            torch.testing.assert_close(outcome.dense[f"top.{name}"], parameter.detach(), atol=TOLERANCE, rtol=0)


def _name(value: object) -> str:
    return f"{value.kind}-{value.optimizer}" if isinstance(value, Case) else str(value)


@pytest.mark.parametrize(
    ("world", "local_world", "case"),
    [(w, n, case) for w, n in RANKS for case in cases(w, n)],
    ids=_name,
)
def test_losses_and_weights_equal_the_unsharded_model(world: int, local_world: int, case: Case) -> None:
    assert_equal(outcomes(world, local_world)[case], plain(case.optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("case", further_cases(), ids=_name)
def test_so_they_do_with_other_optimizers(case: Case) -> None:
    assert_equal(outcomes(2, 2, further=True)[case], plain(case.optimizer))


@pytest.mark.parametrize(("world", "local_world"), RANKS)
def test_the_types_asked_for_are_the_types_that_ran(world: int, local_world: int) -> None:
    for case, ranks in outcomes(world, local_world).items():
        types = {table.path: table.sharding_type for table in ranks[0].plan.tables}
        if case.kind == "mixed":
            assert set(types.values()) == {"table_wise", "row_wise", "grid_shard", "column_wise"}
            continue
        assert {types[path] for path in types if "sequences" not in path} == {case.kind}
        sequence = case.kind if case.kind in SEQUENCE_TYPES else "table_wise"
        assert {types[path] for path in types if "sequences" in path} == {sequence}


@pytest.mark.parametrize("kind", ["column_wise", "grid_shard"])
def test_column_shards_may_keep_states_of_their_own(kind: str) -> None:
    case = Case(kind, "rowwise_adagrad", "separate")
    local_world = 2 if kind == "column_wise" else 1
    ranks = [
        outcome for (outcome,) in run_ranks(2, train_all, local_world, [case], timeout_s=120, local_world=local_world)
    ]
    assert "each column shard" in ranks[0].plan.notes[0]
    split = {table.path for table in ranks[0].plan.tables if table.splits_columns}
    separate, exact = plain("rowwise_adagrad", parts=2).tables, plain("rowwise_adagrad").tables
    for path in split:
        found = assemble(ranks, path, *separate[path].shape)
        assert (found - exact[path].detach()).abs().max() > 0.01
    if kind == "column_wise":
        assert_equal(ranks, plain("rowwise_adagrad", parts=2))


def test_in_exact_state_column_cuts_are_not_noted() -> None:
    for ranks in outcomes(2, 2).values():
        assert ranks[0].plan.notes == ()
