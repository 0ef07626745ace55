"""The rank of each query's target among all items, chunk by chunk of the items."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torchrec import JaggedTensor

from thresher.errors import MetricError
from thresher.trainer.metrics.samples import DIVERGED
from thresher.trainer.model import Retriever

ItemChunk = tuple[int, Tensor]
"""First row, and [n, D] vectors of the n rows from it on."""


def item_chunks(model: Retriever, device: torch.device, rows: int = 1 << 14) -> Iterator[ItemChunk]:
    """Vectors of all items of ``model``, ``rows`` at a time. Collective where tables are sharded: all ranks iterate."""
    for start in range(model.first_item, model.item_rows, rows):
        stop = min(start + rows, model.item_rows)
        yield start, model.items(torch.arange(start, stop, device=device))


def target_ranks(
    queries: Tensor,
    targets: Tensor,
    target_vectors: Tensor,
    chunks: Iterable[ItemChunk],
    *,
    first_item: int,
    seen: JaggedTensor | None = None,
    block: int = 1024,
) -> Tensor:
    """Ranks of targets among all items; memory beyond the arguments is ``block`` times the rows of a chunk.

    Scores are inner products taken in float64 and rounded to float32, so that items of equal vectors tie whatever the
    chunks. A target's rank is 1 + the number of items that score higher + half the number of *other* items that score
    the same: the average over the orders of the tie, so a model that scores all n items alike stands at (n + 1) / 2 and
    not at 1. The items are passed over once, so queries of a whole evaluation share one lookup of the item table.

    Args:
        queries: [N, D].
        targets: [N] int64 rows. A target below ``first_item`` (missing, or never seen in training) is no item: its
            rank is infinite.
        target_vectors: [N, D], the vectors of ``targets``.
        chunks: vectors of all items, adjoining and ascending; rows below ``first_item`` do not count.
        first_item: the smallest row that is an item.
        seen: rows that each query's user knows already (N lengths); they do not compete with the target. None ranks
            among all items.
        block: queries scored at a time.

    Returns:
        [N] float64 ranks >= 1, on the device of ``queries``.

    Raises:
        MetricError: a query or an item vector is not finite; chunks do not adjoin; a target is beyond the last item.
    """
    wanted = _scores(queries, target_vectors.unsqueeze(1)).squeeze(1)
    _finite(wanted, "the score of a target")
    known = _pairs(seen, targets)
    ranks = torch.ones(targets.numel(), dtype=torch.float64, device=queries.device)
    end: int | None = None
    for start, vectors in chunks:
        if end is not None and start != end:
            raise MetricError(f"a chunk of items starts at row {start}, not {end}", fix="give adjoining chunks")
        end = start + len(vectors)
        start, vectors = max(start, first_item), vectors[max(first_item - start, 0) :]
        _finite(vectors, "an item vector")
        for at in range(0, targets.numel(), block):
            rows = slice(at, min(at + block, targets.numel()))
            scores = _scores(queries[rows], vectors)
            _exclude(scores, known, rows, start)
            # Higher + equal / 2 = (all + sum of signs) / 2: one pass, three times as fast as two counts of booleans.
            ranks[rows] += (scores.shape[1] + scores.sub_(wanted[rows, None]).sign_().sum(1)) / 2
    _check_targets(targets, end or 0)
    return ranks.masked_fill(targets < first_item, torch.inf)


def _scores(queries: Tensor, vectors: Tensor) -> Tensor:
    """[n, D] queries with [m, D] vectors to [n, m], or with one vector each ([n, 1, D]) to [n, 1]; float32."""
    wide = queries.double()
    if vectors.dim() == 3:
        return (wide.unsqueeze(1) * vectors.double()).sum(-1).float()
    return (wide @ vectors.double().T).float()


def _pairs(seen: JaggedTensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Query number and item row of everything that does not compete: the target itself, and what is seen."""
    numbers = torch.arange(targets.numel(), device=targets.device)
    if seen is None:
        return numbers, targets
    owners = torch.repeat_interleave(numbers, seen.lengths().to(targets.device))
    # Sorted by query, so that a block's pairs are one slice.
    owners, rows = torch.cat([numbers, owners]), torch.cat([targets, seen.values().to(targets.device)])
    order = torch.argsort(owners, stable=True)
    return owners[order], rows[order]


def _exclude(scores: Tensor, pairs: tuple[Tensor, Tensor], block: slice, start: int) -> None:
    """Takes out of ``scores`` (of the queries of ``block`` with items from row ``start`` on) what does not compete."""
    owners, rows = pairs
    bounds = torch.tensor([block.start, block.stop], device=owners.device)
    low, high = torch.searchsorted(owners, bounds).tolist()
    owners, rows = owners[low:high] - block.start, rows[low:high] - start
    here = (rows >= 0) & (rows < scores.shape[1])
    scores[owners[here], rows[here]] = -torch.inf


def _finite(values: Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise MetricError(f"{name} is not finite", where="evaluation", fix=DIVERGED)


def _check_targets(targets: Tensor, end: int) -> None:
    if targets.numel() and int(targets.max()) >= end:
        raise MetricError(
            f"target row {int(targets.max())} is beyond the last item, row {end - 1}",
            where="evaluation",
            fix="rank against all rows of the item table",
        )
