import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from thresher.errors import BadIds, ConfigError
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.vocabulary.embedding import SplitEmbedding
from thresher.pipeline.vocabulary.rows import require_rows, row_range
from thresher.pipeline.vocabulary.softmax import SoftmaxHead


@given(rows=st.integers(1, 200), parts=st.integers(1, 16))
def test_ranges_are_even_and_cover_all_rows(rows, parts):
    if parts > rows:
        with pytest.raises(ConfigError, match=f"of {rows} rows cannot be cut into {parts} parts"):
            row_range(rows, parts, 0)
        return
    ranges = [row_range(rows, parts, part) for part in range(parts)]
    assert [row for first, last in ranges for row in range(first, last)] == list(range(rows))
    lengths = [last - first for first, last in ranges]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def _cut(weight, parts):
    ranges = [row_range(len(weight), parts, part) for part in range(parts)]
    pieces = [nn.Parameter(weight[first:last].clone()) for first, last in ranges]
    return [SplitEmbedding(piece, len(weight), parts, part) for part, piece in enumerate(pieces)]


@given(
    seed=st.integers(0, 1000),
    parts=st.integers(1, 5),
    rows=st.integers(5, 17),
    b=st.integers(1, 3),
    t=st.integers(1, 6),
)
@settings(deadline=None, max_examples=40)
def test_any_cut_equals_a_whole_embedding(seed, parts, rows, b, t):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    ids = torch.randint(rows, (b, t), generator=g)
    gradient = torch.randn(b, t, 3, generator=g, dtype=torch.float64)
    cut = _cut(weight, parts)
    found = [part.rows(ids) for part in cut]
    assert [len(f) for f in found] == cut[0].counts(ids).tolist()
    assert torch.equal(cut[0].assemble(ids, found), F.embedding(ids, weight))
    for part, share in zip(cut, cut[0].gradient_parts(ids, gradient), strict=True):
        part.add_gradient(ids, share)
    whole = weight.clone().requires_grad_()
    F.embedding(ids, whole).backward(gradient)
    torch.testing.assert_close(torch.cat([p.weight.grad for p in cut]), whole.grad, rtol=1e-14, atol=1e-14)


def test_gradients_of_embedding_and_output_layer_add_on_one_parameter():
    weight = nn.Parameter(torch.randn(5, 3))
    embedding, head = SplitEmbedding(weight, 5), SoftmaxHead(weight, 0, 5)
    assert embedding.weight is head.weight
    ids = torch.tensor([[1, 1, 4]])
    head.weight.grad = torch.ones(5, 3)
    embedding.add_gradient(ids, torch.ones(3, 3))
    assert weight.grad[:, 0].tolist() == [1, 3, 1, 1, 2]


def test_half_gradients_are_added_in_the_precision_of_the_weight():
    embedding = SplitEmbedding(nn.Parameter(torch.zeros(2, 1)), 2)
    for _ in range(300):
        embedding.add_gradient(torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bfloat16))
    assert embedding.weight.grad[1].item() == 300


def test_a_weight_of_another_part_is_refused():
    with pytest.raises(ValueError, match=r"3 rows given for rows 2\.\.3 of part 1"):
        SplitEmbedding(nn.Parameter(torch.zeros(3, 2)), 4, 2, 1)


def _microbatch(inputs, targets, weights):
    layout = Layout(even_bounds(4, 2), batch=2)
    return Microbatch(layout, torch.tensor(inputs), torch.tensor(targets), torch.tensor(weights))


GOOD = [[0, 1, 2, 3], [4, 0, 1, 2]]
ONES = [[1.0] * 4] * 2


def test_bad_ids_are_refused_with_their_place():
    require_rows(_microbatch(GOOD, GOOD, ONES), 0, 5)
    with pytest.raises(BadIds, match=r"microbatch 3, slice 1, row 0, token 2: input 5 is outside 0\.\.4"):
        require_rows(_microbatch([[0, 1, 5, 3], [4, 0, 1, -2]], GOOD, ONES), 3, 5)
    with pytest.raises(BadIds, match="slice 0, row 1, token 0: target -1 is outside"):
        require_rows(_microbatch(GOOD, [[0, 1, 2, 3], [-1, 0, 1, 2]], ONES), 0, 5)


def test_targets_that_do_not_count_may_be_anything():
    require_rows(_microbatch(GOOD, [[-100, 1, 2, 3], [4, 0, 1, 2]], [[0.0, 1, 1, 1], [1.0] * 4]), 0, 5)


def test_inputs_that_are_vectors_are_no_ids():
    vectors = [[[9.0]] * 4] * 2
    require_rows(_microbatch(vectors, GOOD, ONES), 0, 5)
