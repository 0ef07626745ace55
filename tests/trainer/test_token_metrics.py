"""Loss and perplexity of tokens."""

import math

import pytest
import torch

from thresher.trainer.metrics import TokenMetrics
from thresher.trainer.state import lower_is_better


def test_loss_is_the_mean_over_tokens_whatever_the_batches() -> None:
    metrics = TokenMetrics(likelihood=True)
    for loss, weight in ((2.0, 1.0), (9.0, 3.0), (0.0, 0.0)):
        metrics.update(torch.tensor(loss), torch.tensor(weight))
    assert metrics.compute() == pytest.approx({"loss": 11 / 4, "perplexity": math.exp(11 / 4)})


def test_other_losses_have_no_perplexity_and_no_tokens_no_loss() -> None:
    assert list(TokenMetrics(likelihood=False).compute()) == ["loss"]
    assert all(math.isnan(value) for value in TokenMetrics(likelihood=True).compute().values())


def test_a_loss_beyond_floats_has_an_infinite_perplexity() -> None:
    metrics = TokenMetrics(likelihood=True)
    metrics.update(torch.tensor(1e4), torch.tensor(1.0))
    assert metrics.compute()["perplexity"] == math.inf


def test_both_are_the_better_the_lower() -> None:
    assert lower_is_better("loss")
    assert lower_is_better("perplexity")
    assert not lower_is_better("hr@10")
