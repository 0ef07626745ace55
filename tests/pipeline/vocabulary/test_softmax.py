import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.pipeline.vocabulary.cut import Case, assert_equal, by_autograd, make_case, run_cut
from thresher.pipeline.vocabulary.head import SliceTargets
from thresher.pipeline.vocabulary.softmax import SoftmaxHead


def _make(smoothing=0.0, block_rows=0):
    def make(weight, first, vocabulary):
        return SoftmaxHead(weight, first, vocabulary, smoothing=smoothing, block_rows=block_rows)

    return make


def _reference(case: Case, smoothing: float = 0.0):
    def loss_of(hidden, weight):
        logits = (hidden @ weight.t()).flatten(0, 1)
        losses = F.cross_entropy(logits, case.targets.rows.flatten(), reduction="none", label_smoothing=smoothing)
        return (losses * case.targets.weights.flatten()).sum()

    return by_autograd(loss_of, case)


@given(
    seed=st.integers(0, 10_000),
    parts=st.integers(1, 5),
    vocabulary=st.integers(5, 23),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 7),
    smoothing=st.sampled_from([0.0, 0.1]),
    block_rows=st.sampled_from([0, 1, 3, 100]),
)
@settings(deadline=None, max_examples=60)
def test_any_cut_equals_cross_entropy_on_the_whole(seed, parts, vocabulary, batch, tokens, smoothing, block_rows):
    case = make_case(seed, batch, tokens, vocabulary, 4)
    assert_equal(run_cut(_make(smoothing, block_rows), case, parts), _reference(case, smoothing), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_states_have_wide_logits(dtype, tolerance):
    case = make_case(1, 2, 16, 50, 8)
    narrow = Case(case.hidden.to(dtype), case.weight.float(), case.targets)
    ours = run_cut(_make(), narrow, 3)
    assert ours.hidden.dtype == ours.loss.dtype == ours.weight.dtype == torch.float32
    rounded = Case(narrow.hidden.double(), narrow.weight.double(), case.targets)
    theirs = _reference(rounded)
    for name in ("loss", "hidden", "weight"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(theirs, name), rtol=0, atol=tolerance)


def test_logits_far_apart_between_parts_neither_overflow_nor_vanish():
    case = make_case(2, 1, 6, 8, 4)
    case.weight[:4] *= 300
    assert_equal(run_cut(_make(), case, 4), _reference(case), 1e-10)


def test_a_token_of_weight_0_leaves_no_trace_whatever_it_holds():
    case = make_case(3, 2, 5, 11, 4)
    case.targets.weights[0, 2] = case.targets.weights[1, 4] = 0
    clean = run_cut(_make(), case, 2)
    rows, hidden = case.targets.rows.clone(), case.hidden.clone()
    rows[0, 2], rows[1, 4] = -100, 10**12
    hidden[0, 2], hidden[1, 4] = torch.nan, torch.inf
    soiled = Case(hidden, case.weight, SliceTargets(rows, case.targets.weights, case.targets.key))
    for block_rows in (0, 2):
        assert_equal(run_cut(_make(block_rows=block_rows), soiled, 2), clean, 1e-14)
    assert (clean.hidden[0, 2] == 0).all()


def test_a_slice_of_padding_alone_has_loss_and_gradients_0():
    case = make_case(4, 1, 4, 9, 4)
    nothing = SliceTargets(case.targets.rows, torch.zeros_like(case.targets.weights), case.targets.key)
    result = run_cut(_make(0.1), Case(torch.full_like(case.hidden, torch.nan), case.weight, nothing), 3)
    assert result.loss == 0
    assert not result.hidden.any()
    assert not result.weight.any()


def test_a_state_that_is_no_number_is_not_hidden():
    case = make_case(5, 1, 4, 9, 4)
    case.targets.weights[0, 1] = 0.5
    case.hidden[0, 1, 0] = torch.nan
    assert run_cut(_make(), case, 2).loss.isnan()


def test_gradients_of_slices_add_up():
    case = make_case(6, 2, 5, 9, 4)
    head = _make()(nn.Parameter(case.weight.clone()), 0, 9)
    for _ in range(2):
        partial, kept = head.part(case.hidden, case.targets)
        head.weight_gradient(kept, head.merge([partial], case.targets).normaliser)
    torch.testing.assert_close(head.weight.grad, 2 * _reference(case).weight, rtol=1e-12, atol=1e-12)


class _Large(TorchDispatchMode):
    """Keeps what operations return of at least ``numbers`` numbers."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.kept = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.kept += [t for t in tree_leaves(found) if torch.is_tensor(t) and t.numel() >= self.numbers]
        return found


@pytest.mark.parametrize(("block_rows", "rows", "buffers"), [(0, 500, 1), (50, 51, 0), (50, 50, 2 * 10)])
def test_logits_of_a_slice_are_one_buffer_or_a_block_at_a_time(block_rows, rows, buffers):
    case = make_case(11, 1, 40, 500, 2)
    head = _make(0.1, block_rows)(nn.Parameter(case.weight), 0, 500)
    with _Large(40 * rows) as large:
        partial, kept = head.part(case.hidden, case.targets)
        head.weight_gradient(kept, head.merge([partial], case.targets).normaliser)
    assert len({tensor.untyped_storage().data_ptr() for tensor in large.kept}) == buffers


def test_autocast_outside_does_not_narrow_the_products():
    case = make_case(7, 1, 6, 9, 4, torch.float32)
    plain = run_cut(_make(), case, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run_cut(_make(), case, 2), plain, 0)


def test_options_out_of_range_are_refused():
    weight = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="smoothing 1"):
        SoftmaxHead(weight, 0, 4, smoothing=1)
    with pytest.raises(ValueError, match="block_rows -1"):
        SoftmaxHead(weight, 0, 4, block_rows=-1)
