"""Other ways to rank fields, to compare with: permutation importance, the gradient's norm, and chance."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from thresher.embeddings.fields.field import Field
from thresher.embeddings.fields.order import OutputOrder
from thresher.embeddings.fields.scores import merged, move_products

Change = Callable[[KeyedJaggedTensor], KeyedJaggedTensor]
Measure = Callable[[Change], float]
"""A model's quality (higher is better) on some data, each batch's ids changed by the argument first."""


def permutation_importance(features: Sequence[str], measure: Measure, repeats: int = 3, seed: int = 0) -> list[float]:
    """What the quality loses when a feature's bags are shuffled among the samples of a batch (Breiman, 2001).

    Args:
        repeats: shuffles whose losses are averaged; each costs a pass over the data.
    """
    whole = measure(lambda ids: ids)
    losses = []
    for feature in features:
        generator = torch.Generator().manual_seed(seed)
        changed = [measure(partial(shuffled, feature=feature, generator=generator)) for _ in range(repeats)]
        losses.append(whole - sum(changed) / repeats)
    return losses


def shuffled(ids: KeyedJaggedTensor, feature: str, generator: torch.Generator) -> KeyedJaggedTensor:
    """``ids`` with the bags of ``feature`` (weights included) in random order among the samples."""
    keys, samples = ids.keys(), ids.stride()
    order = torch.arange(len(keys) * samples).view(len(keys), samples)
    number = keys.index(feature)
    order[number] = order[number, torch.randperm(samples, generator=generator)]
    bags = order.flatten().to(ids.values().device)
    lengths = ids.lengths()[bags]
    starts = torch.repeat_interleave(ids.offsets()[bags] - (lengths.cumsum(0) - lengths), lengths)
    places = starts + torch.arange(int(lengths.sum()), device=starts.device)
    weights = ids.weights_or_none()
    return KeyedJaggedTensor(keys, ids.values()[places], None if weights is None else weights[places], lengths)


def random_scores(fields: Sequence[Field], seed: int) -> list[float]:
    """Scores by chance, uniform on [0, 1)."""
    drawn: list[float] = torch.rand(len(fields), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


class GradientNorms:
    """Mean over samples of the norm of the loss's gradient at a field's vectors. A listener, as the scorer is one.

    The loss is a mean over the samples of a batch.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._sums = torch.zeros(len(fields), dtype=torch.float64)
        self._samples = torch.zeros(len(fields), dtype=torch.float64)

    @property
    def listening(self) -> bool:
        """Always."""
        return True

    def watch_pooled(self, order: OutputOrder, values: Tensor) -> None:
        """Takes a pooled output [B, D]."""
        values.register_hook(partial(self._pooled, order))  # type: ignore[no-untyped-call]

    def watch_sequence(self, field: int, values: Sequence[Tensor], lengths: Tensor) -> None:
        """Takes the outputs [n, width] of all keys of a field; ``lengths`` [B]."""
        torch.autograd.graph.register_multi_grad_hook(tuple(values), partial(self._sequence, field, lengths))

    def scores(self) -> list[float]:
        """By field."""
        means: list[float] = (self._sums / self._samples.clamp(min=1)).tolist()
        return means

    def _pooled(self, order: OutputOrder, grad: Tensor) -> None:
        squares, of = merged(move_products(-grad, grad, torch.zeros_like(grad[:1]), order), order.fields)
        self._sums[of] += squares.sqrt().sum(0) * grad.shape[0]
        self._samples[of] += grad.shape[0]

    def _sequence(self, field: int, lengths: Tensor, grads: Sequence[Tensor | None]) -> None:
        squares = torch.stack([part.square().sum(1) for part in grads if part is not None]).sum(0)
        owner = torch.repeat_interleave(lengths, output_size=squares.numel())
        of_samples = squares.new_zeros(lengths.numel()).index_add_(0, owner, squares)
        self._sums[field] += of_samples.sqrt().sum() * lengths.numel()
        self._samples[field] += lengths.numel()
