"""Orders of forwards and backwards: spelled out, counted, and compared with those of torch."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from torch.distributed.pipelining import schedules as torch_schedules

from tests.pipeline.schedule.shapes import arguments, brief
from thresher.errors import ScheduleError
from thresher.pipeline.schedule.ops import POLICIES, Kind, Shape
from thresher.pipeline.schedule.orders import compute_orders, group_size, in_flight

Action = torch_schedules._Action
KINDS = {Kind.FORWARD: torch_schedules.FORWARD, Kind.BACKWARD: torch_schedules.FULL_BACKWARD}


def test_slimpipe_on_two_stages():
    first, last = compute_orders(Shape(2, 2, 2, 4))
    forwards = [f"F{k}00 F{k}01 F{k}10 F{k}11 F{k}02 F{k}03 F{k}12 F{k}13" for k in (0, 1)]
    assert brief(op for op in first if op.kind is Kind.FORWARD) == " ".join(forwards)
    assert brief(last) == (
        f"{forwards[0]} "
        "B013 F100 B012 F101 B003 F110 B002 F111 B011 F102 B010 F103 B001 F112 B000 F113 "
        "B113 B112 B103 B102 B111 B110 B101 B100"
    )
    assert brief(first[:10]) == f"{forwards[0]} F100 F101"  # two more in flight than the last rank
    assert brief(first[10:14]) == "B013 F110 B012 F111"


def test_slack_one_holds_one_slice_less_per_hop():
    assert [in_flight(Shape(4, 2, 2, 8, slack=1), rank) for rank in range(4)] == [19, 18, 17, 16]
    assert [in_flight(Shape(4, 2, 2, 8, slack=2), rank) for rank in range(4)] == [22, 20, 18, 16]


def test_one_microbatch_is_all_forward_then_all_backward():
    assert brief(compute_orders(Shape(2, 1, 1, 3))[1]) == "F000 F001 F002 B002 B001 B000"


def test_groups_when_slices_are_no_multiple_of_stages():
    assert group_size(Shape(4, 2, 1, 10)) == 5
    assert brief(compute_orders(Shape(4, 2, 1, 10))[0][:20]) == (
        "F000 F001 F002 F003 F004 F010 F011 F012 F013 F014 F005 F006 F007 F008 F009 F015 F016 F017 F018 F019"
    )
    assert [group_size(Shape(p, 1, 1, n)) for p, n in ((4, 7), (4, 8), (3, 32), (1, 6), (5, 5))] == [7, 4, 4, 1, 5]


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        (Shape(2, 1, 2, 1, policy="gpipe"), 0, "F000 F100 B000 B100"),
        (Shape(2, 2, 2, 1, policy="gpipe"), 0, "F000 F100 F010 F110 B010 B110 B000 B100"),
        (Shape(2, 1, 3, 1, policy="1f1b"), 0, "F000 F100 B000 F200 B100 B200"),
        (Shape(2, 1, 3, 1, policy="1f1b"), 1, "F000 B000 F100 B100 F200 B200"),
        (Shape(2, 1, 2, 2, policy="terapipe"), 0, "F000 F001 F100 F101 B001 B000 B101 B100"),
        (Shape(2, 1, 2, 2, policy="seq1f1b"), 0, "F000 F001 F100 B001 F101 B000 B101 B100"),
        (Shape(2, 1, 2, 2, policy="seq1f1b"), 1, "F000 F001 B001 F100 B000 F101 B101 B100"),
    ],
)
def test_rivals(shape, rank, expected):
    assert brief(compute_orders(shape)[rank]) == expected


@settings(max_examples=60)
@given(arguments())
def test_every_slice_goes_forth_and_back_in_order(given):
    shape = Shape(*given)
    for rank, order in enumerate(compute_orders(shape)):
        live, peak = [], 0
        for op in order:
            place = (op.microbatch, op.chunk, op.slice)
            if op.kind is Kind.FORWARD:
                assert op.slice == sum(other[:2] == place[:2] for other in live)
                live.append(place)
            else:
                same = [other for other in live if other[:2] == place[:2]]
                assert same[-1] == place
                live.remove(place)
            peak = max(peak, len(live))
        assert not live
        assert len(order) == 2 * shape.microbatches * shape.chunks * shape.slices
        assert peak == in_flight(shape, rank)


def torch_interleaved(shape):
    """Rank lists of torch's Interleaved1F1B without its modules and process groups."""
    rounds = max(1, shape.microbatches // shape.stages)
    schedule = SimpleNamespace(
        n_local_stages=shape.chunks,
        pp_group_size=shape.stages,
        _n_microbatches=shape.microbatches,
        microbatches_per_round=shape.microbatches // rounds,
    )
    calculate = torch_schedules.ScheduleInterleaved1F1B._calculate_single_rank_operations
    return [[action for action in calculate(schedule, rank) if action] for rank in range(shape.stages)]


def as_actions(shape):
    """Our lists in torch's words: a slice is a microbatch of its own."""
    return [
        [Action(shape.stage(rank, op.chunk), KINDS[op.kind], op.microbatch * shape.slices + op.slice) for op in order]
        for rank, order in enumerate(compute_orders(shape))
    ]


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 2), (2, 2, 4), (4, 2, 4), (4, 3, 8), (4, 2, 3), (1, 2, 3), (3, 1, 6)])
def test_interleaved_is_that_of_torch(p, v, m):
    shape = Shape(p, v, m, 1, policy="interleaved")
    ours, theirs = as_actions(shape), torch_interleaved(shape)
    for mine, other in zip(ours, theirs, strict=True):
        by_kind = [[action for action in other if action[1] == kind] for kind in KINDS.values()]
        assert [[action for action in mine if action[1] == kind] for kind in KINDS.values()] == by_kind
        # torch starts with one forward less and then alternates forward first: the same list
        assert mine == other


@pytest.mark.parametrize(
    "shape",
    [Shape(p, v, m, n) for p, n in ((2, 4), (4, 10), (4, 8), (8, 8)) for v in (1, 2) for m in (1, 3)]
    + [Shape(4, 1, 2, 8, policy=policy) for policy in ("terapipe", "seq1f1b")],
    ids=str,
)
def test_torch_accepts_our_orders(shape):
    actions = dict(enumerate(as_actions(shape)))
    stages, count = shape.stages * shape.chunks, shape.microbatches * shape.slices
    mapping = torch_schedules._validate_schedule(actions, shape.stages, stages, count)
    lowered = torch_schedules._add_send_recv({r: list(ops) for r, ops in actions.items()}, mapping.__getitem__, stages)
    torch_schedules._simulate_comms_compute(lowered, mapping.__getitem__, stages)


@pytest.mark.parametrize(
    ("arguments", "where", "what"),
    [
        ((0, 1, 1, 1), "stages", "0 stages. Give at least 1 for stages"),
        ((1, 0, 1, 1), "chunks", "0 chunks"),
        ((1, 1, -2, 1), "microbatches", "-2 microbatches"),
        ((1, 1, 1, 0), "slices", "0 slices"),
        ((2, 1, 1, 2, 3), "slack", "slack 3. 1 holds fewest slices"),
        ((2, 1, 1, 2, 2, "slimpip"), "policy", "no policy 'slimpip'. Did you mean 'slimpipe'?"),
        ((4, 1, 1, 3), "slices", "3 slices are too few for 4 stages. Slimpipe needs slices >= stages"),
        ((2, 1, 2, 2, 2, "gpipe"), "slices", "policy 'gpipe' does not cut sequences, but there are 2 slices"),
        ((2, 1, 2, 2, 2, "1f1b"), "slices", "policy '1f1b' does not cut sequences"),
        ((2, 2, 2, 2, 2, "interleaved"), "slices", "policy 'interleaved' does not cut sequences"),
        ((2, 2, 2, 1, 2, "1f1b"), "chunks", "policy '1f1b' has one chunk per rank, not 2"),
        ((2, 2, 2, 2, 2, "terapipe"), "chunks", "policy 'terapipe' has one chunk per rank"),
        ((2, 2, 2, 2, 2, "seq1f1b"), "chunks", "policy 'seq1f1b' has one chunk per rank"),
        ((2, 2, 5, 1, 2, "interleaved"), "microbatches", "5 microbatches do not make 2 equal rounds on 2 stages"),
    ],
)
def test_impossible_shapes(arguments, where, what):
    with pytest.raises(ScheduleError, match=re.escape(f"pipeline.{where}: {what}")):
        compute_orders(Shape(*arguments))


def test_every_policy_is_known():
    assert all(
        compute_orders(Shape(2, 1, 2, 2 if policy in ("slimpipe", "terapipe", "seq1f1b") else 1, policy=policy))
        for policy in POLICIES
    )
