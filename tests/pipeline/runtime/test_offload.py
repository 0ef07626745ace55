"""Saved tensors that wait on the host, moved by a stand-in that keeps copies and a log."""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.pipeline.attention.one_rank import in_turn, one_rank_store
from tests.pipeline.runtime.tiny import Tiny, padded
from thresher.errors import ConfigError
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.layout import Layout, even_bounds
from thresher.pipeline.runtime import runtime
from thresher.pipeline.runtime.meter import SavedBytes
from thresher.pipeline.runtime.offload import HOST, RETURNED, Mover, Offloader, Parcel, offloaded_slices, pinned_mover
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.recompute import Recompute
from thresher.pipeline.runtime.stage import build_parts
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.ops import Kind, Op

CPU = torch.device("cpu")


@dataclass
class Copies(Mover):
    """Copies on the same device.

    Attributes:
        log: "out" and "back" with numbers of bytes, in order.
    """

    device: torch.device = CPU
    log: list[tuple[str, int]] = field(default_factory=list)

    def send(self, content: Tensor) -> Parcel:
        self.log.append(("out", len(content)))
        return Copy(content.clone(), self.log)


class Copy(Parcel):
    def __init__(self, host: Tensor, log: list[tuple[str, int]]) -> None:
        self.host, self.log, self.device = host, log, None

    def fetch(self) -> None:
        if self.device is None:
            self.log.append(("back", len(self.host)))
            self.device = self.host.clone()

    def take(self) -> Tensor:
        self.fetch()
        return self.device


UNUSED = one_rank_store([Layout((0, 4))])


class Run:
    """Steps of a network, each slice a batch of its own.

    Attributes:
        log: of the mover, by operation.
    """

    def __init__(self, share: float, slices: int = 4, threshold_bytes: int = 1, meter: bool = False) -> None:
        torch.manual_seed(6)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4), nn.Tanh())
        self.mover, self.meter = Copies(), SavedBytes(self.network.parameters()) if meter else None
        self.ops = in_turn(2, slices)
        self.offloader = Offloader(
            self.mover,
            self.ops,
            share,
            excluded=self.network.parameters(),
            meter=self.meter,
            threshold_bytes=threshold_bytes,
        )
        self.log: dict[tuple[str, int, int], list[tuple[str, int]]] = {}

    def step(self) -> list[Tensor]:
        self.network.zero_grad()
        outs: dict[tuple[int, int], Tensor] = {}
        for op in self.ops:
            before = len(self.mover.log)
            key = (op.microbatch, op.slice)
            if op.kind is Kind.FORWARD:
                with self.offloader.forward(op, UNUSED):
                    outs[key] = self.network(torch.full((5, 8), 0.1 * op.slice + op.microbatch)).square().sum()
            else:
                self.offloader.before_backward(op)
                outs.pop(key).backward()
            self.log[op.kind.value, *key] = self.mover.log[before:]
        return [p.grad for p in self.network.parameters()]


SAVED = [5 * 8 * 4, 5 * 16 * 4, 5 * 16 * 4, 5 * 4 * 4]
"""Bytes that the network saves: inputs of three modules, the output of the last, which its square saves again."""


def test_gradients_are_the_same_bit_for_bit() -> None:
    expected, run = Run(0.0).step(), Run(1.0)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run.step(), expected, strict=True))
    assert len(run.mover.log) == 3 * 2 * 2 * 2 * len(SAVED)


def test_what_leaves_and_when_it_comes_back() -> None:
    run = Run(1.0)
    run.step()
    out, back = [("out", size) for size in SAVED], [("back", size) for size in reversed(SAVED)]
    for number in range(2):
        forward = [run.log["F", number, index] for index in range(4)]
        backward = [run.log["B", number, index] for index in reversed(range(4))]
        assert forward == [out, out, [], []]
        assert backward == [[], back, back, []]


def test_slices_that_stay_share_the_meter_of_those_that_leave() -> None:
    run = Run(1.0, meter=True)
    with run.meter:
        gradients = run.step()
    assert all(torch.equal(a, b) for a, b in zip(gradients, Run(0.0).step(), strict=True))
    size = sum(SAVED)
    assert run.meter.live_bytes == 0
    assert run.meter.ledger.live == {"saved": 0, HOST: 0, RETURNED: 0}
    assert run.meter.ledger.peaks[HOST] == 2 * size
    assert run.meter.peak_bytes == 2 * size
    assert run.meter.ledger.peaks[RETURNED] <= 2 * size


def test_small_storages_stay() -> None:
    run = Run(1.0, threshold_bytes=5 * 16 * 4)
    run.step()
    assert {size for _, size in run.mover.log} == {5 * 16 * 4}


def offloaded(function, *inputs: Tensor, store: KVStore = UNUSED, **settings) -> tuple[list[Tensor], Copies]:
    """Gradients of ``inputs`` where all that ``function`` saves leaves, and the mover."""
    mover = Copies()
    offloader = Offloader(mover, in_turn(1, 3), 1.0, threshold_bytes=1, **settings)
    with offloader.forward(Op(Kind.FORWARD, 0, 0, 0), store):
        result = function(*inputs)
    return list(torch.autograd.grad(result, inputs)), mover


def test_views_of_a_storage_travel_together() -> None:
    values = torch.randn(6, 4, requires_grad=True)

    def function(values: Tensor) -> Tensor:
        whole = values * 1
        return whole[2:].t().square().sum() + whole[:3, 1:].exp().sum() + (whole * whole).sum()

    found, mover = offloaded(function, values)
    torch.testing.assert_close(found, list(torch.autograd.grad(function(values), values)))
    assert [kind for kind, _ in mover.log].count("out") == 2


def test_a_storage_written_to_between_travels_twice() -> None:
    weight = torch.ones(4, requires_grad=True)

    def function(weight: Tensor) -> Tensor:
        buffer = torch.zeros(2, 4)
        total = torch.zeros(())
        for row in range(2):
            with torch.no_grad():
                buffer[row] = row + 2.0
            total = total + (weight * buffer[row].detach()).sum()
        return total

    found, mover = offloaded(function, weight)
    assert found[0].tolist() == [5.0] * 4
    assert len(mover.log) == 4


def test_an_address_used_again_is_another_storage() -> None:
    values = torch.randn(50, requires_grad=True)

    def function(values: Tensor) -> Tensor:
        total = torch.zeros(())
        for scale in range(1, 30):
            total = total + (values * scale).sin().sum()
        return total

    found, mover = offloaded(function, values)
    torch.testing.assert_close(found[0], torch.autograd.grad(function(values), values)[0])
    assert [kind for kind, _ in mover.log].count("out") == 29


def test_pools_and_parameters_stay() -> None:
    layout = Layout(even_bounds(8, 2))
    store = one_rank_store([layout])
    own, _ = store.write(0, 0, 0, torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 3))
    values, weight = torch.randn(4, 3, requires_grad=True), nn.Parameter(torch.randn(3, 3), requires_grad=False)
    _, mover = offloaded(lambda x: (x * own[0, 0]).sum() + (x @ weight).sum(), values, store=store, excluded=[weight])
    assert mover.log == []


def test_leaves_stay() -> None:
    values = torch.randn(4, 3, requires_grad=True)
    found, mover = offloaded(lambda x: x.square().sum() + (x + 1).square().sum(), values)
    torch.testing.assert_close(found[0], 4 * values.detach() + 2)
    assert mover.log == [("out", 48), ("back", 48)]


def test_another_device_stays() -> None:
    run = Run(1.0)
    run.mover.device = torch.device("meta")
    run.step()
    assert run.mover.log == []


@pytest.mark.parametrize(
    ("slices", "chunks", "share", "expected"),
    [(8, 1, 0.0, 0), (8, 1, 0.5, 4), (8, 1, 0.7, 5), (8, 1, 1.0, 6), (2, 1, 1.0, 0), (1, 1, 1.0, 0), (4, 2, 0.75, 6)],
)
def test_the_first_slices_leave_but_never_the_last_two(slices: int, chunks: int, share: float, expected: int) -> None:
    ops = in_turn(2, slices, chunks)
    first = [(op.microbatch, op.chunk, op.slice) for op in ops if op.kind is Kind.FORWARD and op.microbatch == 1]
    chosen = offloaded_slices(ops, share)
    assert {key for key in chosen if key[0] == 1} == set(first[:expected])
    assert len(chosen) == 2 * expected


def test_a_graph_that_is_dropped_needs_nothing_back() -> None:
    run = Run(1.0)
    first = run.ops[0]
    with run.offloader.forward(first, UNUSED):
        out = run.network(torch.ones(5, 8))
    del out
    run.offloader.before_backward(Op(Kind.BACKWARD, 0, 0, 0))
    assert {kind for kind, _ in run.mover.log} == {"out"}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("pointwise", [False, True], ids=["softmax", "pointwise"])
def test_a_runtime_that_offloads_computes_the_same(pointwise: bool, recompute: Recompute, monkeypatch) -> None:
    mover = Copies()
    monkeypatch.setattr(runtime, "pinned_mover", lambda device, share: mover if share else None)
    monkeypatch.setattr(runtime, "Offloader", partial(Offloader, threshold_bytes=1))
    builder, schedule = Tiny(layers=4, pointwise=pointwise, drop=0.1), build_schedule(1, 2, 2, 4)
    gradients = []
    for share in (0.0, 1.0):
        parts = build_parts(builder, schedule.shape, 0, CPU)
        options = RuntimeOptions(offload=share, recompute=recompute)
        runtime.PipelineRuntime(schedule, parts, options=options).step(padded(2, 4))
        gradients.append([parameter.grad for parameter in parts.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert len(mover.log) >= 2 * 2 * (2 * 4 - 2)
    assert [kind for kind, _ in mover.log].count("out") == [kind for kind, _ in mover.log].count("back")


def test_host_memory_is_refused_as_a_device() -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.offload: .* 'cpu' is in host memory already\. Set it to 0, or"):
        pinned_mover(CPU, 0.5)
    assert pinned_mover(CPU, 0.0) is None


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_beyond_the_whole_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.offload: .* cannot be offloaded\. Give a share in 0 \.\. 1"):
        pinned_mover(CPU, share)
