"""Scores and pruning of fields do not depend on how tables are sharded, nor on the number of ranks."""

from functools import cache

import pytest
import torch

from tests.multi.fields_twin import DROPPED, SCORED_STEPS, Seen, sharded_all, unsharded
from tests.multi.harness import run_ranks

KINDS = ["table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard", "data_parallel"]


@cache
def reference() -> Seen:
    return unsharded()


@cache
def outcomes(world: int) -> dict[str, list[Seen]]:
    ranks = run_ranks(world, sharded_all, KINDS, timeout_s=120)
    return {kind: [rank[number] for rank in ranks] for number, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_scores_are_the_unsharded_ones(kind):
    wanted = reference().scores
    for seen in outcomes(2)[kind]:
        torch.testing.assert_close(seen.scores.score, wanted.score, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(seen.scores.error, wanted.error, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(seen.mean, reference().mean, atol=1e-6, rtol=1e-6)
        assert seen.scores.weight == wanted.weight


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_alike_after_fields_are_dropped(kind):
    losses = torch.tensor(reference().losses)
    for seen in outcomes(2)[kind]:
        torch.testing.assert_close(torch.tensor(seen.losses), losses, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_only_dropped_fields_read_stand_still(kind):
    for seen in [reference(), *outcomes(2)[kind]]:
        for path in ("inner.mean.mean", "weighted.weighted", "sequences.side"):
            for (_, _, before), (_, _, after) in zip(seen.before[path], seen.after[path], strict=True):
                assert torch.equal(before, after)
        # Their neighbours' tables are still read by others.
        moved = [
            not torch.equal(before, after)
            for path in ("bags.shared", "sequences.item", "bags.alone")
            for (_, _, before), (_, _, after) in zip(seen.before[path], seen.after[path], strict=True)
        ]
        assert all(moved)


def test_the_planted_fields_are_scored():
    scores = reference().scores
    assert {field.name for field in scores.fields} >= set(DROPPED)
    assert bool((scores.score > 0).all())
    assert len(reference().losses) > SCORED_STEPS
