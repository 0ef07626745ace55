"""Softmax attention slice by slice, in the order of a pipeline, against torch's own attention of the whole."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests.pipeline.attention.pointwise_case import Line, Queue
from tests.pipeline.attention.softmax_case import LAYER, Outcome, Step, largest_difference, slimpipe
from thresher.errors import ConfigError
from thresher.pipeline.attention import segments, softmax
from thresher.pipeline.attention.kernels import Plain
from thresher.pipeline.attention.regions import plan_regions
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.runtime.meter import SavedBytes
from thresher.pipeline.schedule.ops import Kind, Op

TOKENS = 61
PACKED = [(0, 5, 7, 30, 31, 32), (0, 1, 44), (0,), (0, 3, 50, 57)]
UNEVEN = (0, 10, 13, 40, 61)


def padded(slices: int, batch: int = 2, microbatches: int = 3) -> list[Layout]:
    return [Layout(even_bounds(TOKENS, slices), batch)] * microbatches


def packed(slices: int) -> list[Layout]:
    return [Layout(even_bounds(TOKENS, slices), 1, starts) for starts in PACKED]


def one_at_a_time(step: Step) -> Outcome:
    """With one slice per microbatch there is no pipeline of two ranks."""
    return step.sliced(slimpipe(len(step.layouts), 1, stages=1))


@pytest.mark.parametrize("slices", [2, 4, 8])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=["heads", "groups", "one key"])
@pytest.mark.parametrize("layouts", [padded, packed])
def test_slices_equal_the_whole(layouts: Callable[[int], list[Layout]], heads: tuple[int, int], slices: int) -> None:
    step = Step(layouts(slices), heads)
    assert largest_difference(step.sliced(), step.whole()) < 1e-12


@pytest.mark.parametrize("layouts", [padded, packed])
def test_one_slice_equals_the_whole(layouts: Callable[[int], list[Layout]]) -> None:
    step = Step(layouts(1))
    assert largest_difference(one_at_a_time(step), step.whole()) < 1e-12


@pytest.mark.parametrize("starts", [(0,), (0, 12, 39)])
def test_uneven_slices(starts: tuple[int, ...]) -> None:
    step = Step([Layout(UNEVEN, 1, starts)] * 4)
    assert largest_difference(step.sliced(), step.whole()) < 1e-12


def test_single_precision() -> None:
    step = Step(padded(8), dtype=torch.float32)
    assert largest_difference(step.sliced(), step.whole()) < 1e-5


def test_half_precision_adds_up_in_single() -> None:
    step, exact = Step(padded(8), dtype=torch.bfloat16), Step(padded(8))
    for into, rounded in zip([*exact.fused, *exact.douts], [*step.fused, *step.douts], strict=True):
        into.data.copy_(rounded.data)
    found, expected = step.sliced(), exact.whole()
    size = max(float(x.abs().max()) for outcome in expected for x in outcome)
    assert largest_difference(found, expected) < 1e-2 * size
    assert all(x.dtype == torch.bfloat16 for outcome in found for x in outcome)


def test_autocast_attends_in_half() -> None:
    step = Step(padded(4), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = step.sliced(), step.whole()
    assert found[0][0].dtype == torch.bfloat16
    assert found[0][1].dtype == torch.float32
    assert largest_difference(found, expected) < 0.05


@pytest.mark.parametrize("layouts", [padded, packed])
def test_backward_may_compute_forward_again(layouts: Callable[[int], list[Layout]]) -> None:
    step = Step(layouts(4))
    assert largest_difference(step.sliced(again=True), step.whole()) < 1e-12


def test_plain_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "choose", lambda _: Plain())
    step = Step(packed(4))
    assert largest_difference(step.sliced(), step.whole()) < 1e-12


def test_gradients_may_be_expanded() -> None:
    step = Step(padded(2, microbatches=1), (2, 2))
    step.douts = [torch.ones(()).double().expand(2, 2, TOKENS, 8)]
    assert largest_difference(step.sliced(), step.whole()) < 1e-12


@given(data=st.data())
@settings(max_examples=40)
def test_any_packing_in_any_pipeline(data: st.DataObject) -> None:
    slices = data.draw(st.integers(2, 7), "slices")
    tokens = data.draw(st.integers(slices, 40), "tokens")
    inner = st.sets(st.integers(1, tokens - 1), min_size=slices - 1, max_size=slices - 1) if slices > 1 else st.just({})
    bounds = (0, *sorted(data.draw(inner, "bounds")), tokens)
    starts = st.sets(st.integers(1, tokens - 1), max_size=9)
    count = data.draw(st.integers(1, 4), "microbatches")
    layouts = [Layout(bounds, 1, (0, *sorted(data.draw(starts, "starts")))) for _ in range(count)]
    stages = data.draw(st.integers(1, slices), "stages")
    step = Step(layouts, width=3)
    assert largest_difference(step.sliced(slimpipe(count, slices, stages)), step.whole()) < 1e-12


def test_long_pieces_are_not_padded() -> None:
    lengths = [300, 3, 2, 7, 270, 5, 1]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    layout = Layout((0, starts[-1]), 1, tuple(starts[:-1]))
    groups = segments.group(layout.segments(0), torch.device("cpu"))
    windows = [group for group in groups if isinstance(group, segments.Window)]
    assert [(w.begin, w.end) for w in windows] == [(0, 300), (312, 582), (587, 588)]
    rows = [group.source.shape for group in groups if isinstance(group, segments.Padded)]
    assert rows == [(2, 3), (2, 7)]
    step = Step([layout], width=4)
    assert largest_difference(one_at_a_time(step), step.whole()) < 1e-12


class Exchange:
    """Two ranks, each with two microbatches of which the second is shared in every operation that has a prefix."""

    def __init__(self, giver: Layout, helper: Layout, share: int, again: bool) -> None:
        self.steps = [Step([giver] * 2, seed=1), Step([helper] * 2, seed=2)]
        self.again, self.sent = again, 0
        self.ports: list[dict[tuple[Kind, int, int], Line]] = [{}, {}]
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            for index in range(1, giver.slices):
                there, back = Queue(), Queue()
                ends = (self.steps[1].microbatches[1], there, back), (self.steps[0].microbatches[1], back, there)
                for side, (partner, out, into) in enumerate(ends):
                    moved = min(share, index) * (1 - 2 * side)
                    self.ports[side][kind, 1, index] = Line(moved, partner, index, out, into)

    def run(self) -> list[Outcome]:
        with ThreadPoolExecutor(2) as pool:
            runs = [
                pool.submit(step.sliced, None, ports, self.again)
                for step, ports in zip(self.steps, self.ports, strict=True)
            ]
            return [run.result(timeout=60) for run in runs]


@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("share", [1, 2, 3])
@pytest.mark.parametrize("starts", [(0,), (0, 12, 20), (0, 35)], ids=["padded", "packed", "late"])
def test_shared_attention_equals_the_whole(starts: tuple[int, ...], share: int, again: bool) -> None:
    giver, helper = Layout(even_bounds(TOKENS, 4), 1, starts), Layout(UNEVEN, 2)
    exchange = Exchange(giver, helper, share, again)
    for found, step in zip(exchange.run(), exchange.steps, strict=True):
        assert largest_difference(found, step.whole()) < 1e-12


def test_what_is_shared_is_sent() -> None:
    layout = Layout(even_bounds(TOKENS, 4), 2)
    exchange = Exchange(layout, layout, 2, again=False)
    exchange.run()
    counts = [[ports[kind, 1, 3].sent for kind in (Kind.FORWARD, Kind.BACKWARD)] for ports in exchange.ports]
    assert counts == [[3, 6], [2, 3]]


def test_nothing_is_sent_where_the_sequence_begins_later() -> None:
    layout = Layout(even_bounds(TOKENS, 4), 1, (0, 16))
    exchange = Exchange(layout, layout, 1, again=False)
    exchange.run()
    assert [line.sent for ports in exchange.ports for (_, _, index), line in ports.items() if index > 1] == [0] * 8


def test_saved_bytes_are_queries_outputs_and_the_pool() -> None:
    tokens, slices, heads, groups, width = 64, 4, 4, 2, 8
    step = Step([Layout(even_bounds(tokens, slices))], (heads, groups), width, torch.float32)
    store = KVStore(plan_regions(slimpipe(1, slices), 0, step.layouts)[0])
    meter = SavedBytes()
    with meter:
        runs = [step.forward(store, Op(Kind.FORWARD, 0, 0, index)) for index in range(slices)]
    pool = 2 * groups * tokens * width
    assert store.bytes == 4 * pool
    assert meter.live_bytes == 4 * (pool + tokens * heads * (2 * width + 1))
    assert store.accumulator_bytes == 0
    for index in reversed(range(slices)):
        step.backward(*runs.pop(), Op(Kind.BACKWARD, 0, 0, index))
        store.release(0, index)
        assert store.accumulator_bytes == (4 * pool * (slices - 1) // slices if index else 0)
    assert (store.bytes, meter.live_bytes) == (0, 0)


def test_backward_of_an_older_slice_first_is_refused() -> None:
    step = Step(padded(4, microbatches=1))
    store = KVStore(plan_regions(slimpipe(1, 4), 0, step.layouts)[0])
    runs = [step.forward(store, Op(Kind.FORWARD, 0, 0, index)) for index in range(2)]
    with pytest.raises(AssertionError, match="backward of slice 0 of microbatch 0 while 2 slices are live"):
        step.backward(*runs[0], Op(Kind.BACKWARD, 0, 0, 0))


def test_layers_do_not_mix() -> None:
    step = Step(padded(2, microbatches=1))
    store = KVStore(plan_regions(slimpipe(1, 2), 0, step.layouts)[0])
    context, first = step.forward(store, Op(Kind.FORWARD, 0, 0, 0))
    other = context.attend(LAYER + 1, *(2 * x for x in step.inputs(0, 0, step.layouts[0].bounds[1])))
    context.again()
    again = context.attend(LAYER, *step.inputs(0, 0, step.layouts[0].bounds[1]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("heads", [(4, 3), (2, 4)])
def test_groups_that_do_not_divide_are_refused(heads: tuple[int, int]) -> None:
    step = Step(padded(2, microbatches=1), heads)
    message = f"{heads[0]} heads of queries with {heads[1]} of keys and {heads[1]} of values"
    with pytest.raises(ConfigError, match=message):
        step.whole()
    with pytest.raises(ConfigError, match=message):
        step.sliced()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float64, 1e-12)])
@pytest.mark.parametrize("width", [8, 20, 64])
@pytest.mark.parametrize("layouts", [padded, packed])
def test_cuda(layouts: Callable[[int], list[Layout]], width: int, dtype: torch.dtype, bound: float) -> None:
    step = Step(layouts(4), width=width, dtype=dtype, device="cuda")
    exact = Step(layouts(4), width=width)
    for into, rounded in zip([*exact.fused, *exact.douts], [*step.fused, *step.douts], strict=True):
        into.data.copy_(rounded.data)
    found = [[x.cpu() for x in outcome] for outcome in step.sliced()]
    assert largest_difference(found, exact.whole()) < bound
