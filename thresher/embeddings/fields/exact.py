"""Scores by two passes over the same data with weights that stand still: first the means, then the moves to them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from thresher.embeddings.fields.field import Field, first_columns
from thresher.embeddings.fields.pruning import FieldPruner
from thresher.embeddings.fields.scorer import FieldScorer
from thresher.embeddings.fields.scores import FieldScores
from thresher.embeddings.fields.tap import Listener, attach

B = TypeVar("B")


def exact_scores(
    fields: Sequence[Field],
    collections: Mapping[str, nn.Module],
    batches: Iterable[B],
    loss: Callable[[B], Tensor],
    weight: Callable[[B], Tensor],
    device: torch.device,
) -> FieldScores:
    """The scores of a model that is not trained meanwhile, over all of ``batches``. Collective where there are ranks.

    Tables that are updated in the backward would be: give unsharded collections, or a learning rate of 0. Gradients of
    parameters are left as they come, to be zeroed.

    Args:
        collections: the model's, by path.
        batches: iterated twice.
        loss: the forward of a batch, sum(weight x loss of a sample) / B.
        weight: [B] fp32.
    """
    nothing = torch.zeros(first_columns(fields)[-1], device=device)
    means = FieldScorer(fields, device, mean=nothing)
    with _attached(collections, fields, means, device):
        for batch in batches:
            means.begin(weight(batch))
            loss(batch)
    means.renew()
    scorer = FieldScorer(fields, device, mean=means.mean())
    with _attached(collections, fields, scorer, device):
        for batch in batches:
            scorer.begin(weight(batch))
            loss(batch).backward()  # type: ignore[no-untyped-call]
    return scorer.read()


@contextmanager
def _attached(
    collections: Mapping[str, nn.Module], fields: Sequence[Field], listener: Listener, device: torch.device
) -> Iterator[None]:
    detach = attach(collections, FieldPruner(fields, device), listener)
    try:
        yield
    finally:
        detach()
