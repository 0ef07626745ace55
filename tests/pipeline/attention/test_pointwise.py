"""Pointwise attention slice by slice against the whole microbatch at once under autograd."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pipeline.attention.one_rank import one_rank_store
from tests.pipeline.attention.pointwise_case import Case, largest_difference, lines
from thresher.errors import BadBatch, ConfigError
from thresher.pipeline.attention import pointwise
from thresher.pipeline.attention.bias import Biases, time_buckets
from thresher.pipeline.attention.rectangles import Rectangles
from thresher.pipeline.attention.sliced import SlicedContext
from thresher.pipeline.runtime.meter import SavedBytes

PACKED = (0, 2, 3, 11, 12)
BATCHES = pytest.mark.parametrize(
    ("batch", "starts"), [(1, (0,)), (3, (0,)), (1, PACKED)], ids=["one", "rows", "packed"]
)


@BATCHES
@pytest.mark.parametrize("slices", [1, 2, 4, 8])
@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize("number", [0, 1], ids=["left", "right"])
@pytest.mark.parametrize("edge", [3, 256])
def test_slices_equal_the_whole(
    slices: int, batch: int, starts: tuple[int, ...], biases: int, number: int, edge: int, monkeypatch
) -> None:
    monkeypatch.setattr(pointwise, "CPU_EDGE", edge)
    case = Case(slices, batch, starts, biases, number)
    assert largest_difference(case.sliced(), case.whole()) < 1e-12


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_cut_into_slices_and_sequences(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 30), label="tokens")
    places = st.sets(st.integers(1, tokens - 1), max_size=min(6, tokens - 1))
    bounds = (0, *sorted(data.draw(places, label="bounds")), tokens)
    starts = (0, *sorted(data.draw(places, label="starts")))
    number, biases = data.draw(st.integers(0, 2), label="number"), data.draw(st.integers(0, 2), label="biases")
    case = Case(len(bounds) - 1, 1, starts, biases, number, tokens, bounds=bounds)
    assert largest_difference(case.sliced(), case.whole()) < 1e-12


@BATCHES
def test_backward_may_compute_forward_again(batch: int, starts: tuple[int, ...]) -> None:
    case = Case(4, batch, starts, number=1)
    assert largest_difference(case.sliced(again=True), case.whole()) < 1e-12


def test_single_precision() -> None:
    case = Case(4, 2, dtype=torch.float32)
    assert largest_difference(case.sliced(), case.whole()) < 1e-5


def test_bfloat16_rounds_operands_and_adds_up_in_single() -> None:
    case, exact = Case(8, 2, tokens=64, dtype=torch.bfloat16), Case(8, 2, tokens=64)
    for leaf, rounded in zip(exact.leaves, case.leaves, strict=True):
        leaf.data.copy_(rounded.data)
    exact.dout.copy_(case.dout)
    found = case.sliced()
    assert all(x.dtype == torch.bfloat16 for x in found)
    scale = [float(x.abs().max()) for x in exact.whole()]
    errors = [float((a - b).abs().max()) for a, b in zip(found, exact.whole(), strict=True)]
    assert max(error / size for error, size in zip(errors, scale, strict=True)) < 2e-2


def test_autocast_takes_the_three_in_half_and_tables_in_full() -> None:
    case = Case(4, 2, dtype=torch.float32)
    expected = case.whole()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.sliced()
    assert found[0].dtype == torch.bfloat16
    assert {x.dtype for x in found[1:]} == {torch.float32}
    assert 1e-6 < largest_difference(found, expected) < 0.1


def test_nothing_depends_on_chance() -> None:
    case = Case(4, 2)
    first, second = case.sliced(), case.sliced()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("biases", [0, 2])
@pytest.mark.parametrize("starts", [(0,), (0, 3, 17)], ids=["whole", "packed"])
@pytest.mark.parametrize("number", [0, 1], ids=["left", "right"])
@pytest.mark.parametrize("share", [1, 3])
def test_a_helper_computes_the_same(share: int, number: int, starts: tuple[int, ...], biases: int, again: bool) -> None:
    batch = 1 if len(starts) > 1 else 2
    giver = Case(5, batch, starts, biases, number, seed=1)
    helper = Case(4, 1, (0,), biases, 1 - number, tokens=13, seed=2)
    to_helper, to_giver = {}, {}
    for direction, slice_there, slice_here in (("F", 3, 0), ("F", 4, 1), ("B", 4, 2), ("B", 2, 1)):
        there, here = lines(giver, slice_there, helper, slice_here, min(share, slice_there))
        to_helper[direction, slice_there], to_giver[direction, slice_here] = there, here
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(case.sliced, p, again) for case, p in ((giver, to_helper), (helper, to_giver))]
        found = [run.result(timeout=30) for run in runs]
    assert largest_difference(found[0], giver.whole()) < 1e-12
    assert largest_difference(found[1], helper.whole()) < 1e-12
    forward, backward = 3 + biases, 4 + biases
    assert [line.sent for line in to_helper.values()] == [forward, forward] + [backward + forward * again] * 2
    assert [line.sent for line in to_giver.values()] == [1, 1] + [3 + biases + again] * 2


def test_only_inputs_are_kept_and_once() -> None:
    case = Case(4, tokens=400)
    meter = SavedBytes(case.leaves[3:])
    with meter:
        case.sliced()
    inputs = 3 * case.leaves[0].nbytes
    assert meter.peak_bytes == inputs
    assert meter.live_bytes == 0


class Sizes(TorchDispatchMode):
    """Watches every operation.

    Attributes:
        largest: elements of the largest tensor that an operation made.
    """

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [x for x in (made if isinstance(made, (list, tuple)) else [made]) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return made


def test_scores_exist_one_rectangle_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(pointwise, "CPU_EDGE", 32)
    case, sizes = Case(2, tokens=400), Sizes()
    with sizes:
        case.sliced()
    scores, inputs = 3 * 32 * 32, case.leaves[0].numel()
    assert inputs < 3 * 200 * 200 / 10
    assert sizes.largest <= max(2 * scores, inputs)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("others", [0, 1])
def test_a_joint_projection_is_kept_only_where_all_of_it_is_needed(slices: int, others: int) -> None:
    """Queries, keys and values are often views of one storage, next to gates that attention does not want."""
    case = Case(slices, tokens=8, biases=0)
    joint = torch.randn(1, 3, 8 // slices, (3 + others) * 5, dtype=torch.float64, requires_grad=True)
    query, key, value, *_ = (joint * 1).split(5, -1)
    store = one_rank_store([case.layout])
    meter = SavedBytes()
    with meter:
        context = SlicedContext(store, case.microbatch, 0, 0, seed=0, step=0, training=True)
        out = context.attend_pointwise(0, query, key, value, None)
    tokens = 8 // slices + 2 * store.regions.capacity if slices > 1 else 3 * 8
    assert meter.live_bytes == tokens * 3 * 5 * 8
    assert out.shape == query.shape


def test_rows_longer_than_the_tables_share_their_last_entries() -> None:
    case = Case(3, tokens=40)
    short, long = case.whole()[4][:, -1].abs().min(), case.whole()[5][:, -1].abs().min()
    assert min(short, long) > 0
    assert largest_difference(case.sliced(), case.whole()) < 1e-12


def test_buckets_of_times_are_exact() -> None:
    powers = torch.tensor([1 << k for k in range(52)])
    around = torch.cat([powers - 2, powers - 1, powers, -powers])
    expected = [min(int(1 + abs(d)).bit_length() - 1, 30) for d in around.tolist()]
    assert time_buckets(around, 31).tolist() == expected


def test_times_are_required_by_a_table_of_times() -> None:
    case = Case(2)
    object.__setattr__(case.microbatch, "times", None)
    with pytest.raises(BadBatch, match=r"Microbatch\.times: attention is biased by time.*Hand in \[B, S\] int64"):
        case.sliced()
    with pytest.raises(BadBatch, match="attention is biased by time"):
        case.whole()


@pytest.mark.parametrize("run", ["sliced", "whole"])
@pytest.mark.parametrize(
    ("leaf", "name"), [(1, "keys"), (2, "values"), (3, "biases by position"), (4, "biases by time")]
)
def test_heads_must_agree(run: str, leaf: int, name: str) -> None:
    case = Case(2)
    few = case.leaves[leaf][:1] if leaf > 2 else case.leaves[leaf][:, :1]
    case.leaves[leaf] = few.detach().requires_grad_()
    with pytest.raises(ConfigError, match=f"3 heads of queries.* 1 heads of {name}.*Give all of them the same number"):
        getattr(case, run)()


def test_only_rectangles_with_visible_pairs_are_visited() -> None:
    case = Case(1)
    rectangles = Rectangles(Biases(None, None, case.leaves[0]), 12, 4)
    own = list(rectangles._walk(range(12), range(12)))
    assert own == [(range(r, r + 4), range(c, c + 4)) for r in (0, 4, 8) for c in range(0, r + 1, 4)]
    assert len(list(rectangles._walk(range(12, 20), range(12)))) == 6
