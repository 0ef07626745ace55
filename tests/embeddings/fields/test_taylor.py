"""The score against permutation importance on planted fields, and what dropping fields does to predictions."""

import pytest
import torch
from scipy.stats import spearmanr

from tests.embeddings.fields.planted import CPU, KEYS, NOISE, Clicks, Net, clicks, loss_of, trained
from thresher.embeddings.fields.baselines import permutation_importance
from thresher.embeddings.fields.exact import exact_scores


@pytest.fixture(scope="module")
def net() -> Net:
    return trained(seed=0)


@pytest.fixture(scope="module")
def held_out() -> Clicks:
    return clicks(20_000, seed=100)


def importance(net: Net, data: Clicks) -> list[float]:
    """The rise of the loss when a field is shuffled."""

    def quality(change) -> float:
        with torch.no_grad():
            return -float(loss_of(net, change(data.sparse), data.labels))

    return permutation_importance(KEYS, quality, repeats=3)


def scores(net: Net, data: Clicks) -> list[float]:
    parts = [data.part(slice(first, first + 1000)) for first in range(0, len(data.labels), 1000)]
    found = exact_scores(
        net.fields(),
        {"bags": net.bags},
        parts,
        loss=lambda part: loss_of(net, part.sparse, part.labels),
        weight=lambda part: torch.ones(len(part.labels)),
        device=CPU,
    )
    return [found.by_name()[key] for key in KEYS]


def by_hand(net: Net, data: Clicks, signed: bool) -> list[float]:
    """The formula of the paper with one gradient for each sample, by autograd and nothing of the package."""
    values = net.bags(data.sparse).values().detach().requires_grad_()
    losses = torch.nn.functional.binary_cross_entropy_with_logits(net.top(values)[:, 0], data.labels, reduction="sum")
    (grad,) = torch.autograd.grad(losses, values)
    moves = (grad * (values.mean(0) - values)).detach().view(len(data.labels), len(KEYS), -1).sum(2)
    return (moves.mean(0).abs() if signed else moves.abs().mean(0)).tolist()


def test_exact_scores_are_the_formula(net, held_out):
    torch.testing.assert_close(torch.tensor(scores(net, held_out)), torch.tensor(by_hand(net, held_out, signed=False)))


def test_scores_rank_fields_as_permutation_does(net, held_out):
    wanted = importance(net, held_out)
    found = scores(net, held_out)
    assert spearmanr(found, wanted).statistic >= 0.95
    assert min(zip(found, KEYS, strict=True))[1] == NOISE


def test_without_the_absolute_value_they_do_not(net, held_out):
    wanted = importance(net, held_out)
    assert spearmanr(by_hand(net, held_out, signed=True), wanted).statistic < 0.95
