"""Every gradient of a pipeline equals that of one process that knows nothing of slices."""

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product

import pytest
import torch

from tests.multi.harness import run_ranks
from tests.pipeline.runtime.tiny import SEED, Layer, Reference, Tiny, packed, padded
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import build_parts
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.ops import Kind
from thresher.pipeline.schedule.work import Work

CPU = torch.device("cpu")
SHAPES = [
    (2, 1, 2, 4),
    (4, 1, 2, 8),
    (2, 2, 2, 4),
    (4, 2, 2, 8),
    (4, 2, 3, 10),
    (2, 1, 1, 4),
    (4, 1, 2, 4),
    (1, 3, 2, 6),
]
FORCED = {"exchange": ExchangeRule(forced=True), "work": Work(attention=1.0)}


@dataclass(frozen=True)
class Case:
    """One training run: a model, what it is given, how the schedule is built and carried out."""

    build: Tiny
    given: tuple[Microbatch, ...]
    settings: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    steps: int = 1

    def __str__(self):
        kind = "packed" if self.given[0].layout.is_packed else "padded"
        return f"{self.build}, {kind}, {self.settings}, {self.options}"


def trained(rank, world, shape, cases):
    """Of each case: gradients (after several steps, weights) of what ``rank`` holds by name, loss, input gradients."""
    groups = None
    if world > 1:
        settings = {key: value for case in cases for key, value in case.settings.items() if value}
        fullest = build_schedule(*shape, **settings)
        groups = make_groups(fullest, [range(world)], timedelta(seconds=60))
    return [_trained(rank, groups, shape, case) for case in cases]


def _trained(rank, groups, shape, case):
    schedule = build_schedule(*shape, **case.settings)
    parts = build_parts(case.build, schedule.shape, rank, CPU)
    options = RuntimeOptions(timeout=timedelta(seconds=60), seed=SEED, **case.options)
    runtime = PipelineRuntime(schedule, parts, groups, options)
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
    for step in range(case.steps):
        optimizer.zero_grad()
        outcome = runtime.step(case.given, step=step)
        if case.steps > 1:
            optimizer.step()
    values = {name: p.grad if case.steps == 1 else p.detach() for name, p in global_names(parts)}
    evaluated = runtime.evaluate(case.given, step=case.steps).loss
    return values, float(outcome.loss), list(outcome.input_gradients), float(evaluated)


def global_names(parts):
    for stage in parts.stages:
        yield from stage.named_parameters()
    if parts.embedding is not None:
        yield "embedding.weight", parts.embedding.weight
    if parts.head is not None and (parts.embedding is None or parts.head.weight is not parts.embedding.weight):
        yield "head.weight", parts.head.weight


def reference(case):
    """The same from one process."""
    model, names = Reference(case.build), {"embedding": "embedding.weight", "head": "head.weight"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = [replace(m, inputs=m.inputs.clone().requires_grad_(m.are_vectors)) for m in case.given]
    for step in range(case.steps):
        optimizer.zero_grad()
        loss = model.loss(given, step)
        loss.backward()
        if case.steps > 1:
            optimizer.step()
    values = {names.get(k, k): (p.grad if case.steps == 1 else p.detach()) for k, p in model.named_parameters()}
    inputs = [m.inputs.grad for m in given if m.are_vectors]
    return values, float(loss.detach()), inputs, float(model.eval().loss(given, case.steps).detach())


def require_equal(shape, cases, tolerance=1e-10):
    world = shape[0]
    found = [trained(0, 1, shape, cases)] if world == 1 else run_ranks(world, trained, shape, cases, timeout_s=150)
    for number, case in enumerate(cases):
        values, loss, inputs, evaluated = reference(case)
        answers = [rank[number] for rank in found]
        merged = {}
        for named, other_loss, _, other_evaluated in answers:
            assert other_loss == pytest.approx(loss, abs=tolerance), str(case)
            assert other_evaluated == pytest.approx(evaluated, abs=tolerance), str(case)
            for name, value in named.items():
                merged.setdefault(name, []).append(value)
        assert merged.keys() == values.keys(), str(case)
        for name, wanted in values.items():
            _require_close(merged[name], wanted, tolerance, f"{case}: {name}")
        for value, wanted in zip(answers[0][2], inputs, strict=True):
            _require_close([value], wanted, tolerance, f"{case}: inputs")


def _require_close(parts, wanted, tolerance, where):
    if wanted is None:
        assert all(part is None for part in parts), where
        return
    scale = max(float(wanted.abs().max()), 1e-3)
    worst = float((torch.cat(parts) - wanted).abs().max()) if len(parts) > 1 else float((parts[0] - wanted).abs().max())
    assert worst <= tolerance * min(scale, 1.0), f"{where}: off by {worst}, values up to {scale}"


def cases_of(shape):
    """Exchange off and forced, softmax and pointwise, padded and packed, tied and untied."""
    _, _, m, n = shape
    cases = []
    for exchange, pointwise, jagged, tied in product(({}, FORCED), *[(False, True)] * 3):
        given = packed(m, n) if jagged else padded(m, n)
        split = {"split_head": True, "split_embedding": True} if tied or pointwise else {}
        cases.append(Case(Tiny(pointwise=pointwise, tied=tied), tuple(given), {**exchange, **split}))
    return cases


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_those_of_one_process(shape):
    """Five of sixteen cases, in which every two choices meet in all ways."""
    cases = cases_of(shape)
    require_equal(shape, [cases[number] for number in (0b0000, 0b0111, 0b1011, 0b1101, 0b1110)])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_those_of_one_process_in_all_cases(shape):
    require_equal(shape, cases_of(shape))


class Unadded(Layer):
    """Ends with a matrix: its output has the dtype of autocast."""

    def forward(self, values, context):
        return self.narrow(self.wide(super().forward(values, context)))


@dataclass(frozen=True)
class EndsLow(Tiny):
    def layer(self, index):
        return self._seeded(index, lambda: Unadded(index, self.pointwise, self.drop))


@pytest.mark.parametrize(("kind", "bound"), [(Tiny, 0.03), (EndsLow, 0.2)])
def test_bf16_autocast_stays_near_fp32(kind, bound):
    given = tuple(replace(m, weights=m.weights.float()) for m in padded(2, 4))
    build, options = kind(dtype=torch.float32), {"autocast": torch.bfloat16}
    found = run_ranks(2, trained, (2, 2, 2, 4), [Case(build, given, FORCED, options)], timeout_s=60)
    wanted = reference(Case(build, given))[0]
    for name, value in (item for rank in found for item in rank[0][0].items()):
        error = (value - wanted[name]).norm() / wanted[name].norm()
        assert 1e-5 < error < bound, f"{name}: {error}"


def test_forced_exchange_moves_keys_and_values():
    for shape in ((2, 1, 2, 4), (4, 2, 2, 8), (4, 2, 3, 10)):
        kinds = Counter(op.kind for ops in build_schedule(*shape, **FORCED).ranks for op in ops)
        assert kinds[Kind.EXCHANGE_FORWARD] > 0
        assert kinds[Kind.EXCHANGE_BACKWARD] > 0


@pytest.mark.parametrize("shape", [(2, 2, 2, 4), (4, 1, 2, 8)], ids=str)
def test_options_change_nothing(shape):
    _, _, m, n = shape
    plain, jagged = tuple(padded(m, n)), tuple(packed(m, n))
    dropped = Tiny(drop=0.3)
    require_equal(
        shape,
        [
            Case(Tiny(), plain, {"split_backward": True, "split_head": True}),
            Case(Tiny(), jagged, {**FORCED, "split_backward": True}),
            Case(dropped, plain, FORCED, {"recompute": "full"}),
            Case(dropped, jagged, {"split_head": True}),
            Case(Tiny(pointwise=True, drop=0.3), jagged, FORCED, {"recompute": "full"}),
            Case(Tiny(), tuple(padded(m, n, vectors=True)), {"split_head": True, "slack": 1}),
        ],
    )


@pytest.mark.parametrize("policy", ["gpipe", "1f1b", "interleaved", "terapipe", "seq1f1b"])
def test_rival_policies_compute_the_same(policy):
    chunks = 2 if policy == "interleaved" else 1
    slices = 4 if policy in ("terapipe", "seq1f1b") else 1
    require_equal((2, chunks, 2, slices), [Case(Tiny(), tuple(padded(2, slices)), {"policy": policy})])


def test_the_same_weights_after_five_steps():
    given = tuple(packed(2, 4))
    build = Tiny(tied=True, drop=0.1)
    split = {"split_head": True, "split_embedding": True}
    require_equal((2, 2, 2, 4), [Case(build, given, split, steps=5), Case(Tiny(), given, steps=5)])


def test_fp32_within_1e_5():
    shape = (2, 2, 2, 4)
    given = tuple(replace(m, weights=m.weights.float()) for m in padded(2, 4))
    cases = [Case(Tiny(dtype=torch.float32, pointwise=pointwise), given) for pointwise in (False, True)]
    require_equal(shape, cases, tolerance=1e-5)
