import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.pipeline.vocabulary.cut import Case, assert_equal, by_autograd, make_case, run_cut
from thresher.pipeline.vocabulary.binary import BinaryHead
from thresher.pipeline.vocabulary.head import SliceTargets
from thresher.pipeline.vocabulary.negatives import Frequencies, LogUniform, Uniform
from thresher.pipeline.vocabulary.sampled import SampledSoftmaxHead


def _sampler(name: str, vocabulary: int):
    if name == "frequencies":
        return Frequencies(torch.arange(vocabulary) % 4)
    return {"uniform": Uniform, "log_uniform": LogUniform}[name](1, vocabulary)


def _make(head, sampler, count):
    def make(weight, first, vocabulary):
        return head(weight, first, sampler=sampler, count=count)

    return make


def _sampled_reference(case: Case, sampler, count: int):
    drawn = sampler.draw(case.targets.key, count)
    corrections = sampler.log_share(drawn) + math.log(count)

    def loss_of(hidden, weight):
        states, rows = hidden.flatten(0, 1), case.targets.rows.flatten()
        positive = (states * weight[rows]).sum(1, keepdim=True)
        negative = (states @ weight[drawn].t() - corrections).masked_fill(rows.unsqueeze(1) == drawn, -torch.inf)
        logits = torch.cat([positive, negative], 1)
        losses = F.cross_entropy(logits, torch.zeros_like(rows), reduction="none")
        return (losses * case.targets.weights.flatten()).sum()

    return by_autograd(loss_of, case)


def _binary_reference(case: Case, sampler, count: int):
    rows = case.targets.rows.flatten()
    drawn = sampler.draw(case.targets.key, rows.numel() * count).view(-1, count)

    def loss_of(hidden, weight):
        states = hidden.flatten(0, 1)
        positive = F.softplus(-(states * weight[rows]).sum(1))
        negative = F.softplus((states.unsqueeze(1) * weight[drawn]).sum(2)) * (drawn != rows.unsqueeze(1))
        return ((positive + negative.sum(1)) * case.targets.weights.flatten()).sum()

    return by_autograd(loss_of, case)


HEADS = {"sampled": (SampledSoftmaxHead, _sampled_reference), "binary": (BinaryHead, _binary_reference)}


@pytest.mark.parametrize("head", HEADS)
@given(
    seed=st.integers(0, 10_000),
    parts=st.integers(1, 5),
    vocabulary=st.integers(5, 23),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 7),
    count=st.integers(1, 9),
    name=st.sampled_from(["uniform", "log_uniform", "frequencies"]),
)
@settings(deadline=None, max_examples=60)
def test_any_cut_equals_autograd_on_the_whole(head, seed, parts, vocabulary, batch, tokens, count, name):
    case, sampler = make_case(seed, batch, tokens, vocabulary, 4), _sampler(name, vocabulary)
    kind, reference = HEADS[head]
    assert_equal(run_cut(_make(kind, sampler, count), case, parts), reference(case, sampler, count), 1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_states_have_wide_logits(head, dtype, tolerance):
    case, sampler = make_case(1, 2, 16, 50, 8), Uniform(0, 50)
    kind, reference = HEADS[head]
    narrow = Case(case.hidden.to(dtype), case.weight.float(), case.targets)
    ours = run_cut(_make(kind, sampler, 20), narrow, 3)
    assert ours.hidden.dtype == ours.loss.dtype == torch.float32
    theirs = reference(Case(narrow.hidden.double(), narrow.weight.double(), case.targets), sampler, 20)
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(theirs, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("head", HEADS)
def test_a_token_of_weight_0_leaves_no_trace_whatever_it_holds(head):
    case, sampler = make_case(3, 2, 5, 11, 4), Uniform(0, 11)
    case.targets.weights[0, 2] = case.targets.weights[1, 4] = 0
    make = _make(HEADS[head][0], sampler, 6)
    clean = run_cut(make, case, 2)
    rows, hidden = case.targets.rows.clone(), case.hidden.clone()
    rows[0, 2], rows[1, 4] = -100, 10**12
    hidden[0, 2], hidden[1, 4] = torch.nan, torch.inf
    soiled = Case(hidden, case.weight, SliceTargets(rows, case.targets.weights, case.targets.key))
    assert_equal(run_cut(make, soiled, 2), clean, 1e-14)
    nothing = SliceTargets(rows, torch.zeros_like(case.targets.weights), case.targets.key)
    empty = run_cut(make, Case(hidden, case.weight, nothing), 3)
    assert empty.loss == 0
    assert not empty.hidden.any()
    assert not empty.weight.any()


def test_a_part_without_negatives_or_targets_does_not_pull_logits_up_to_its_own_0():
    case, sampler = make_case(8, 1, 4, 6, 4), Uniform(0, 2)
    case.targets.rows.fill_(0)
    case.hidden.copy_(case.hidden.abs() + 1)
    case.weight[:2] = -400
    assert_equal(run_cut(_make(SampledSoftmaxHead, sampler, 3), case, 3), _sampled_reference(case, sampler, 3), 1e-10)


@pytest.mark.parametrize("name", ["uniform", "log_uniform"])
def test_the_sampled_loss_tends_to_the_full_one(name):
    case = make_case(9, 1, 8, 7, 4)
    case.hidden.mul_(0.5)
    case.targets.rows.clamp_(min=1)
    sampled = run_cut(_make(SampledSoftmaxHead, _sampler(name, 7), 100_000), case, 2)

    def full(hidden, weight):
        logits = (hidden @ weight.t()).flatten(0, 1)[:, 1:]
        losses = F.cross_entropy(logits, case.targets.rows.flatten() - 1, reduction="none")
        return (losses * case.targets.weights.flatten()).sum()

    assert_equal(sampled, by_autograd(full, case), 1e-2)


@pytest.mark.parametrize("name", ["uniform", "log_uniform", "frequencies"])
def test_draws_follow_the_distribution_that_is_corrected_for(name):
    sampler, draws = _sampler(name, 12), 200_000
    rows = sampler.draw((1, 2, 3, 4), draws)
    counted = torch.bincount(rows, minlength=12).double()
    possible = counted.nonzero().squeeze(1)
    shares = sampler.log_share(possible).exp()
    assert shares.sum().item() == pytest.approx(1, abs=1e-12)
    spread = (draws * shares * (1 - shares)).sqrt()
    assert ((counted[possible] - draws * shares).abs() < 5 * spread).all()


def test_draws_depend_on_all_of_the_key_and_on_nothing_else():
    sampler = Uniform(0, 1 << 40)
    first = sampler.draw((1, 2, 3, 4), 8)
    assert torch.equal(first, sampler.draw((1, 2, 3, 4), 8))
    for key in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 2, 4, 3)):
        assert not (first == sampler.draw(key, 8)).any()


def test_impossible_samplers_and_counts_are_refused():
    weight = nn.Parameter(torch.zeros(4, 2))
    for head in (SampledSoftmaxHead, BinaryHead):
        with pytest.raises(ValueError, match="0 negatives"):
            head(weight, 0, sampler=Uniform(0, 4), count=0)
    with pytest.raises(ValueError, match=r"no rows 3\.\.2"):
        Uniform(3, 3)
    for counts in ([1.0, -1.0], [0.0, 0.0], [torch.nan, 1.0]):
        with pytest.raises(ValueError, match="counts of rows"):
            Frequencies(torch.tensor(counts))
