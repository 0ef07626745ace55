"""Runs a head cut into parts, as ranks of a pipeline would."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thresher.pipeline.vocabulary.head import Head, SliceTargets
from thresher.pipeline.vocabulary.rows import row_range

Make = Callable[[nn.Parameter, int, int], Head]
"""Head of (weight, first row, vocabulary)."""


@dataclass
class Result:
    loss: Tensor
    hidden: Tensor
    weight: Tensor


@dataclass
class Case:
    """One slice: hidden states, the whole weight, targets and weights of tokens."""

    hidden: Tensor
    weight: Tensor
    targets: SliceTargets


def make_case(seed: int, batch: int, tokens: int, vocabulary: int, width: int, dtype=torch.float64) -> Case:
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, tokens, generator=g, dtype=dtype) * (
        torch.rand(batch, tokens, generator=g, dtype=dtype) > 0.3
    )
    rows = torch.randint(vocabulary, (batch, tokens), generator=g)
    hidden = torch.randn(batch, tokens, width, generator=g, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=g, dtype=dtype)
    return Case(hidden, weight, SliceTargets(rows, weights / max(float(weights.sum()), 1e-3), (seed, 1, 2, 3)))


def run_cut(make: Make, case: Case, parts: int) -> Result:
    """Loss and gradients of ``parts`` parts; the gradient of the weight is that of all of them, joined."""
    vocabulary = len(case.weight)
    heads = []
    for part in range(parts):
        first, last = row_range(vocabulary, parts, part)
        heads.append(make(nn.Parameter(case.weight[first:last].clone()), first, vocabulary))
    sent = [head.part(case.hidden, case.targets) for head in heads]
    for head, (partial, _) in zip(heads, sent, strict=True):
        assert partial.statistics.shape == (*case.hidden.shape[:2], head.statistics)
        assert partial.gradient.shape == case.hidden.shape
    merged = heads[-1].merge([partial for partial, _ in sent], case.targets)
    for head, (_, kept) in zip(heads, sent, strict=True):
        head.weight_gradient(kept, merged.normaliser)
    return Result(merged.loss, merged.gradient, torch.cat([head.weight.grad for head in heads]))


def by_autograd(loss_of: Callable[[Tensor, Tensor], Tensor], case: Case) -> Result:
    """The same through autograd, from ``loss_of(hidden, weight)`` on the whole vocabulary."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = loss_of(hidden, weight)
    loss.backward()
    return Result(loss.detach(), hidden.grad, weight.grad)


def assert_equal(ours: Result, theirs: Result, tolerance: float) -> None:
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(
            getattr(ours, name),
            getattr(theirs, name),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
