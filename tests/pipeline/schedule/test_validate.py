"""Whatever is wrong with a schedule is refused, with the operation that is wrong."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _validate_schedule

from tests.pipeline.schedule.execution import Wrong, execute
from thresher.errors import ScheduleError
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.lower import lower
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Schedule, Shape
from thresher.pipeline.schedule.orders import compute_orders
from thresher.pipeline.schedule.place import main_lists
from thresher.pipeline.schedule.validate import validate
from thresher.pipeline.schedule.work import Prices, Work

PLAIN = build_schedule(2, 2, 2, 4)
SPLIT = build_schedule(2, 2, 2, 4, split_embedding=True, split_head=True, split_backward=True)
SHARED = build_schedule(4, 1, 2, 8, exchange=ExchangeRule(forced=True), work=Work(1.0))
WIDE = build_schedule(3, 1, 2, 6)
ALL = {"plain": PLAIN, "split": SPLIT, "shared": SHARED, "wide": WIDE}

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD  # noqa: E741
S, R, D = Kind.SEND, Kind.RECEIVE, Kind.RELEASE
XF, XB = Kind.EXCHANGE_FORWARD, Kind.EXCHANGE_BACKWARD
ACT, GRAD = Payload.ACTIVATION, Payload.GRADIENT


def lists_of(schedule):
    return [list(ops) for ops in schedule.ranks]


def edited(schedule, lists):
    return Schedule(schedule.shape, tuple(map(tuple, lists)))


def at(ops, kind, k=None, c=None, i=None, payload=None, peer=None, nth=0):
    wanted = {"kind": kind, "microbatch": k, "chunk": c, "slice": i, "payload": payload, "peer": peer}
    found = [
        n for n, op in enumerate(ops) if all(getattr(op, name) == v for name, v in wanted.items() if v is not None)
    ]
    return found[nth]


def swap(ops, first, second):
    ops[first], ops[second] = ops[second], ops[first]


def move(ops, start, to):
    ops.insert(to, ops.pop(start))


def change(ops, where, **fields):
    ops[where] = replace(ops[where], **fields)


def _release_right_after_send(r):
    """Of a row gradient, which the other rank only receives after a loss that needs this rank."""
    send = at(r[0], S, 0, 0, 3, Payload.ROW_GRADIENT)
    op = replace(r[0][send], kind=D)
    if op in r[0]:
        r[0].remove(op)
    r[0].insert(send + 1, op)


def _share_too_much(r):
    giver = next(n for n, op in enumerate(r[0]) if op.kind is XF and op.share > 0)
    op = r[0][giver]
    other = at(r[op.peer], XF, *op.partner)
    change(r[0], giver, share=op.slice + 1)
    change(r[op.peer], other, share=-op.slice - 1)


def _share_crosswise(r):
    """Couples F i of rank 0 with F j of rank 1 and the other way round, both of which come in the wrong order."""
    for rank, ops in enumerate(r):
        r[rank] = [op for op in ops if op.kind not in (XF, XB)]
    for rank, mine, other, share in ((0, 7, 5, 1), (1, 5, 7, -1), (0, 6, 6, 1), (1, 6, 6, -1)):
        op = Op(XF, 0, 0, mine, peer=1 - rank, share=share, partner=(0, 0, other))
        r[rank].insert(at(r[rank], F, 0, 0, mine), op)


def _exchange_apart(r):
    where = at(r[0], XF)
    swap(r[0], where, where + 1)


def _exchange_after_receive(r):
    move(r[0], at(r[0], XF, nth=2), at(r[0], XF, nth=2) - 3)


def _early_receives(r):
    found = [n for n, op in enumerate(r[1]) if op.kind is R and op.payload is ACT]
    for where in found[:4]:
        move(r[1], where, found.index(where))


def _misorder_receives(r):
    swap(r[1], at(r[1], R, payload=ACT), at(r[1], R, payload=ACT, nth=1))


def _misorder_sends(r):
    first = at(r[0], S, payload=ACT)
    second = at(r[0], S, payload=ACT, nth=1)
    move(r[0], first, second)


def _live_too_many(r):
    back = at(r[1], B)
    forward = next(n for n in range(back, len(r[1])) if r[1][n].kind is F)
    move(r[1], forward, back)


BREAKS = {
    "slices swapped forward": (PLAIN, lambda r: swap(r[0], at(r[0], F, 0, 0, 0), at(r[0], F, 0, 0, 1)), "it needs"),
    "slices swapped backward": (PLAIN, lambda r: swap(r[0], at(r[0], B, 0, 1, 3), at(r[0], B, 0, 1, 2)), "it needs"),
    "backward before forward": (PLAIN, lambda r: move(r[1], at(r[1], B, 0, 1, 3), 0), "it needs"),
    "weights before their backward": (SPLIT, lambda r: move(r[0], at(r[0], W), 5), "it needs"),
    "loss before forward": (PLAIN, lambda r: move(r[1], at(r[1], Kind.LOSS), 0), "it needs"),
    "head's weights before its loss": (SPLIT, lambda r: move(r[1], at(r[1], Kind.HEAD_WEIGHT), 0), "it needs"),
    "row gradients before the backward": (SPLIT, lambda r: move(r[0], at(r[0], Kind.EMBED_BACKWARD), 9), "it needs"),
    "no forward": (PLAIN, lambda r: r[0].pop(at(r[0], F, 1, 0, 2)), "lacks forward"),
    "no backward": (PLAIN, lambda r: r[0].pop(at(r[0], B, 1, 0, 2)), "lacks backward"),
    "no loss": (PLAIN, lambda r: r[1].pop(at(r[1], Kind.LOSS)), "lacks loss"),
    "no head": (SPLIT, lambda r: r[0].pop(at(r[0], Kind.HEAD)), "lacks head"),
    "no gradient of the head": (SPLIT, lambda r: r[0].pop(at(r[0], Kind.HEAD_WEIGHT)), "lacks head_weight"),
    "no embedding": (SPLIT, lambda r: r[1].pop(at(r[1], Kind.EMBED)), "lacks embed"),
    "no gradient of the embedding": (SPLIT, lambda r: r[1].pop(at(r[1], Kind.EMBED_BACKWARD)), "lacks embed_backward"),
    "no gradient of weights": (SPLIT, lambda r: r[0].pop(at(r[0], W)), "backward of its weights is missing"),
    "gradient of weights twice": (SPLIT, lambda r: change(r[0], at(r[0], I), kind=B), "gradients of weights already"),
    "split where nothing is": (PLAIN, lambda r: change(r[0], at(r[0], B), kind=I), "are not split"),
    "weights where nothing is split": (PLAIN, lambda r: r[0].append(Op(W, 0, 0, 0)), "no such operation"),
    "forward twice": (PLAIN, lambda r: r[0].append(Op(F, 0, 0, 0)), "there already, as operation"),
    "slice of another microbatch": (
        PLAIN,
        lambda r: change(r[0], at(r[0], F, 0, 1, 2), microbatch=1),
        "there already|it needs",
    ),
    "microbatch out of range": (
        PLAIN,
        lambda r: change(r[0], at(r[0], F), microbatch=2),
        "microbatch 2 is outside 0..1",
    ),
    "chunk out of range": (PLAIN, lambda r: change(r[0], at(r[0], F), chunk=-1), "chunk -1 is outside 0..1"),
    "slice out of range": (PLAIN, lambda r: change(r[0], at(r[0], F), slice=4), "slice 4 is outside 0..3"),
    "loss on the first rank": (PLAIN, lambda r: r[0].append(r[1][at(r[1], Kind.LOSS)]), "Losses are on rank 1"),
    "loss in a wrong chunk": (
        PLAIN,
        lambda r: change(r[1], at(r[1], Kind.LOSS), chunk=0),
        "Losses are on rank 1, chunk 1",
    ),
    "head that is not cut": (PLAIN, lambda r: r[0].append(Op(Kind.HEAD, 0, 1, 0)), "only with split_head"),
    "embedding that is not cut": (PLAIN, lambda r: r[0].append(Op(Kind.EMBED, 0, 0, 0)), "only with split_embedding"),
    "too few lists": (PLAIN, lambda r: r.pop(), "1 lists for 2 stages"),
    "nothing sent": (PLAIN, lambda r: r[0].pop(at(r[0], S)), "is not sent to rank 1"),
    "nothing received": (PLAIN, lambda r: r[1].pop(at(r[1], R)), "is not received from rank 0"),
    "sent twice": (PLAIN, lambda r: r[0].append(r[0][at(r[0], S)]), "there already"),
    "received twice": (PLAIN, lambda r: r[1].append(r[1][at(r[1], R)]), "there already"),
    "released twice": (PLAIN, lambda r: r[0].append(r[0][at(r[0], D)]), "there already"),
    "sent to a rank that needs it not": (WIDE, lambda r: change(r[0], at(r[0], S), peer=2), "needs no such message"),
    "sent to itself": (PLAIN, lambda r: change(r[0], at(r[0], S), peer=0), "no other rank"),
    "sent to nobody": (PLAIN, lambda r: change(r[0], at(r[0], S), peer=-1), "no other rank"),
    "gradient sent as activation": (
        PLAIN,
        lambda r: change(r[1], at(r[1], S, payload=GRAD), payload=ACT),
        "already|no such",
    ),
    "sent before it is made": (PLAIN, lambda r: swap(r[0], at(r[0], S), at(r[0], F)), "before what it sends is made"),
    "received too late": (PLAIN, lambda r: swap(r[1], at(r[1], R), at(r[1], F)), "comes after what it is for"),
    "received out of order": (PLAIN, _misorder_receives, "at that place"),
    "sent out of order": (PLAIN, _misorder_sends, "at that place"),
    "received too early": (WIDE, _early_receives, "wait to be used, at most 2"),
    "released before it is sent": (PLAIN, lambda r: move(r[0], at(r[0], D), 0), "before its send"),
    "released in a circle": (
        SPLIT,
        _release_right_after_send,
        "stops at release row_gradient .* waits for the receive",
    ),
    "released and not sent": (PLAIN, lambda r: r[1].append(Op(D, 0, 1, 0, ACT, 0)), "needs no such message"),
    "too many live": (PLAIN, _live_too_many, "9 slices are live, at most 8"),
    "transfer of nothing": (PLAIN, lambda r: change(r[0], at(r[0], S), payload=None), "needs a payload"),
    "forward with payload": (PLAIN, lambda r: change(r[0], at(r[0], F), payload=ACT), "only transfers have a payload"),
    "forward with peer": (PLAIN, lambda r: change(r[0], at(r[0], F), peer=1), "have a peer"),
    "forward with share": (PLAIN, lambda r: change(r[0], at(r[0], F), share=1), "only exchanges"),
    "exchange without share": (SHARED, lambda r: change(r[0], at(r[0], XF), share=0), "needs a share"),
    "exchange without partner": (SHARED, lambda r: change(r[0], at(r[0], XF), partner=None), "needs a share"),
    "exchange with itself": (SHARED, lambda r: change(r[1], at(r[1], XF), peer=1), "no other rank"),
    "both give": (SHARED, lambda r: change(r[0], at(r[0], XB), share=-r[0][at(r[0], XB)].share), "counterpart|only 0"),
    "one side only": (SHARED, lambda r: r[0].pop(at(r[0], XF)), "does not share its operation"),
    "another partner": (SHARED, lambda r: change(r[0], at(r[0], XF), partner=(1, 0, 7)), "counterpart|does not share"),
    "another peer": (
        SHARED,
        lambda r: change(r[0], at(r[0], XF), peer=r[0][at(r[0], XF)].peer % 3 + 1),
        "counterpart|does not share",
    ),
    "exchange after its operation": (SHARED, _exchange_apart, "the next operation is"),
    "exchange apart from its operation": (SHARED, _exchange_after_receive, "the next operation is"),
    "exchange of the other direction": (SHARED, lambda r: change(r[0], at(r[0], XF), kind=XB), "the next operation is"),
    "more shared than there is": (SHARED, _share_too_much, "come before the giver's"),
    "shared crosswise": (SHARED, _share_crosswise, "rank 0 stops at .* rank 1 stops at"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_refuses(name):
    schedule, break_it, message = BREAKS[name]
    lists = lists_of(schedule)
    break_it(lists)
    with pytest.raises(ScheduleError, match=message) as caught:
        validate(edited(schedule, lists))
    assert "rank" in caught.value.message or name == "too few lists"


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_accepts_what_is_built(schedule):
    validate(schedule)
    execute(schedule)


def test_names_rank_number_and_operation():
    lists = lists_of(PLAIN)
    first, second = at(lists[1], F, 0, 0, 0), at(lists[1], F, 0, 0, 1)
    swap(lists[1], first, second)
    with pytest.raises(ScheduleError) as caught:
        validate(edited(PLAIN, lists))
    assert caught.value.message == (
        f"ScheduleError: schedule, rank 1, operation {first}: forward (microbatch 0, chunk 0, slice 1): "
        f"it needs forward (microbatch 0, chunk 0, slice 0), which comes later, as operation {second}"
    )


def test_refuses_more_live_slices_than_asked_for():
    validate(PLAIN, max_live=10)
    with pytest.raises(ScheduleError, match=r"rank 0, operation .*: forward .*: 10 slices are live, at most 9 may be"):
        validate(PLAIN, max_live=9)


def test_refuses_an_exchange_of_other_policies():
    shape = replace(SHARED.shape, policy="terapipe")
    with pytest.raises(ScheduleError, match="policy 'terapipe' has no exchange"):
        validate(Schedule(shape, SHARED.ranks))


def test_refuses_a_shape_that_nothing_has():
    with pytest.raises(ScheduleError, match=r"8 slices are too few|too few for 9 stages"):
        validate(Schedule(replace(SHARED.shape, stages=9), SHARED.ranks))


def test_refuses_what_waits_in_a_circle_and_says_where_each_rank_stops():
    """Rank 0 goes back with the first microbatch before it goes forward with the second, rank 1 the other way round."""
    gpipe = build_schedule(2, 1, 2, 1, policy="gpipe")
    lists = [[op for op in ops if op.kind is not D] for ops in gpipe.ranks]
    for kind in (S, F):
        move(lists[0], at(lists[0], kind, k=1), at(lists[0], B, k=0))
    wrong = edited(gpipe, lists)
    stops = r"rank 0 stops at backward \(microbatch 0.* \(its operation \d+\); rank 1 stops at forward \(microbatch 1"
    with pytest.raises(ScheduleError, match=stops):
        validate(wrong)
    with pytest.raises(Wrong, match="hangs"):
        execute(wrong)


def _with_swapped_slices(shape):
    """On all ranks alike, forwards of slices 0 and 1 change places, transfers included."""

    def swapped(op):
        return replace(op, slice=1 - op.slice) if op.slice < 2 and op.kind in (F, Kind.LOSS) else op

    lists = main_lists(shape, compute_orders(shape))
    return lower(shape, [[swapped(op) for op in ops] for ops in lists], Prices(shape.slices, Work()))


def _for_torch(schedule):
    """Compute actions by rank, with microbatch * slices + slice for torch's microbatch."""
    shape = schedule.shape
    types = {F: _ComputationType.FORWARD, B: _ComputationType.FULL_BACKWARD}
    return {
        rank: [
            _Action(shape.stage(rank, op.chunk), types[op.kind], op.microbatch * shape.slices + op.slice)
            for op in schedule.of(rank, F, B)
        ]
        for rank in range(shape.stages)
    }


def test_refuses_swapped_slices_that_torch_accepts():
    """torch.distributed.pipelining takes slices for independent microbatches."""
    shape = Shape(2, 1, 2, 4)
    wrong = _with_swapped_slices(shape)
    _validate_schedule(_for_torch(wrong), 2, 2, 8)
    with pytest.raises(ScheduleError, match=r"it needs forward .*slice 0"):
        validate(wrong)
    with pytest.raises(Wrong, match=r"slice 1 sees \[\]"):
        execute(wrong)


@st.composite
def mutated(draw):
    """A valid schedule with one to three changes of any kind."""
    schedule = ALL[draw(st.sampled_from(sorted(ALL)))]
    lists = lists_of(schedule)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        _mutate(draw, schedule.shape, lists)
    assume(lists != lists_of(schedule))
    return edited(schedule, lists)


def _mutate(draw, shape, lists):
    ops = lists[draw(st.integers(0, shape.stages - 1))]
    where = draw(st.integers(0, len(ops) - 1))
    match draw(st.sampled_from(("swap", "next", "move", "delete", "twice", "field", "other rank"))):
        case "swap":
            swap(ops, where, draw(st.integers(0, len(ops) - 1)))
        case "next":
            swap(ops, where, where - 1)
        case "move":
            move(ops, where, min(len(ops) - 1, where + draw(st.integers(1, 6))))
        case "delete":
            ops.pop(where)
        case "twice":
            ops.insert(draw(st.integers(0, len(ops))), ops[where])
        case "other rank":
            other = lists[draw(st.integers(0, shape.stages - 1))]
            other.insert(draw(st.integers(0, len(other))), ops.pop(where))
        case "field":
            _change_field(draw, shape, ops, where)


def _change_field(draw, shape, ops, where):
    values = {
        "kind": st.sampled_from(Kind),
        "microbatch": st.integers(0, shape.microbatches - 1),
        "chunk": st.integers(0, shape.chunks - 1),
        "slice": st.integers(0, shape.slices - 1),
        "payload": st.sampled_from([None, *Payload]),
        "peer": st.integers(-1, shape.stages - 1),
        "share": st.integers(-3, 3),
        "partner": st.tuples(st.integers(0, 1), st.just(0), st.integers(0, shape.slices - 1)),
    }
    name = draw(st.sampled_from(sorted(values)))
    change(ops, where, **{name: draw(values[name])})


def _check_one(schedule):
    """What is accepted can be executed, and trains what it should."""
    try:
        validate(schedule)
    except ScheduleError:
        return
    execute(schedule)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_accepts_no_random_change_that_matters(schedule):
    _check_one(schedule)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_accepts_no_random_change_that_matters_at_length(schedule):
    _check_one(schedule)
