"""Ranks of targets against a sort of the full score matrix."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec import JaggedTensor

from thresher.data.batch import Batch
from thresher.errors import MetricError
from thresher.trainer.metrics import item_chunks, target_ranks
from thresher.trainer.model import Retriever


def chunked(items: Tensor, first: int, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(first, len(items), size):
        yield start, items[start : start + size]


def oracle_rank(scores: list[float], target: int, first: int, seen: set[int]) -> float:
    """The mean place of the target over all orders that the scores allow."""
    if target < first:
        return math.inf
    others = [scores[row] for row in range(first, len(scores)) if row != target and row not in seen]
    above = sum(score > scores[target] for score in others)
    level = sum(score == scores[target] for score in others)
    return sum(1 + above + place for place in range(level + 1)) / (level + 1)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(0, 9),
    count=st.integers(3, 40),
    first=st.integers(0, 2),
    start=st.integers(0, 2),
    chunk=st.integers(1, 41),
    block=st.integers(1, 10),
    history=st.booleans(),
)
def test_ranks_equal_the_sorted_matrix(
    seed: int, queries: int, count: int, first: int, start: int, chunk: int, block: int, history: bool
) -> None:
    torch.manual_seed(seed)
    # Whole numbers: many exact ties.
    wanted, items = torch.randint(-2, 3, (queries, 3)).float(), torch.randint(-2, 3, (count, 3)).float()
    targets = torch.randint(0, count, (queries,))
    lengths = torch.randint(0, 6, (queries,))
    seen = JaggedTensor(values=torch.randint(0, count, (int(lengths.sum()),)), lengths=lengths) if history else None
    ranks = target_ranks(
        wanted,
        targets,
        items[targets],
        chunked(items, min(start, first), chunk),
        first_item=first,
        seen=seen,
        block=block,
    )
    known = [set(part.tolist()) for part in seen.to_dense()] if seen is not None else [set()] * queries
    matrix = (wanted @ items.T).tolist()
    expected = [oracle_rank(matrix[q], int(targets[q]), first, known[q]) for q in range(queries)]
    assert ranks.tolist() == expected


def test_equal_scores_stand_in_the_middle() -> None:
    ranks = target_ranks(
        torch.zeros(1, 4), torch.tensor([5]), torch.ones(1, 4), chunked(torch.ones(11, 4), 2, 4), first_item=2
    )
    assert ranks.tolist() == [5.0]


def test_equal_vectors_tie_in_any_chunk() -> None:
    torch.manual_seed(0)
    vector = torch.randn(1, 37)
    items = vector.expand(1000, 37)
    for chunk in (1, 7, 333, 1000):
        ranks = target_ranks(
            torch.randn(64, 37), torch.arange(64), items[:64], chunked(items, 0, chunk), first_item=0, block=5
        )
        assert ranks.tolist() == [500.5] * 64


def test_autocast_does_not_blur_scores() -> None:
    torch.manual_seed(0)
    items, queries, targets = torch.randn(300, 16), torch.randn(50, 16), torch.arange(50)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(target_ranks(queries, targets, items[:50], chunked(items, 0, 100), first_item=0).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("query", "item", "message"),
    [
        (math.nan, 0.0, "evaluation: the score of a target is not finite. The model diverged"),
        (0.0, math.nan, "evaluation: an item vector is not finite. The model diverged"),
    ],
)
def test_vectors_that_are_not_finite_are_refused(query: float, item: float, message: str) -> None:
    items = torch.zeros(4, 2)
    items[3, 1] = item
    with pytest.raises(MetricError, match=message):
        target_ranks(torch.full((1, 2), query), torch.tensor([1]), torch.ones(1, 2), chunked(items, 0, 2), first_item=0)


def test_a_target_beyond_the_items_is_refused() -> None:
    items = torch.zeros(4, 2)
    with pytest.raises(MetricError, match=r"target row 4 is beyond the last item, row 3. Rank against all rows"):
        target_ranks(torch.ones(1, 2), torch.tensor([4]), torch.ones(1, 2), chunked(items, 0, 3), first_item=0)


def test_chunks_with_a_gap_are_refused() -> None:
    chunks = [(0, torch.zeros(2, 2)), (3, torch.zeros(1, 2))]
    with pytest.raises(MetricError, match=r"a chunk of items starts at row 3, not 2. Give adjoining chunks"):
        target_ranks(torch.ones(1, 2), torch.tensor([1]), torch.ones(1, 2), chunks, first_item=0)


class Fixed(Retriever):
    """Items whose vectors are their row numbers."""

    item_rows, first_item = 7, 2

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    loss = queries = target = forward  # type: ignore[assignment]

    def items(self, rows: Tensor) -> Tensor:
        return rows[:, None].float()


def test_item_chunks_cover_every_item_once() -> None:
    chunks = list(item_chunks(Fixed(), torch.device("cpu"), rows=2))
    assert [start for start, _ in chunks] == [2, 4, 6]
    assert torch.cat([vectors for _, vectors in chunks]).flatten().tolist() == [2, 3, 4, 5, 6]
