"""Builds schedules: orders, then everything else between them, then exchanges, then transfers."""

from collections.abc import Iterator

from thresher.pipeline.schedule.exchange import ExchangeRule, plan_exchange
from thresher.pipeline.schedule.graph import identity
from thresher.pipeline.schedule.lower import lower
from thresher.pipeline.schedule.ops import Kind, Op, Schedule, Shape
from thresher.pipeline.schedule.orders import Orders, compute_orders
from thresher.pipeline.schedule.place import Exchanges, main_lists, place
from thresher.pipeline.schedule.work import Prices, Work


def build_schedule(
    stages: int,
    chunks: int,
    microbatches: int,
    slices: int,
    slack: int = 2,
    policy: str = "slimpipe",
    *,
    split_embedding: bool = False,
    split_head: bool = False,
    split_backward: bool = False,
    exchange: ExchangeRule | None = None,
    work: Work | None = None,
) -> Schedule:
    """The lists of all ranks: what to compute, send, receive and share, in which order.

    The same on every rank that calls it with the same arguments.

    Args:
        stages: ranks of the pipeline, p.
        chunks: stages per rank, v.
        microbatches: per step, m; any number.
        slices: per microbatch, n; "slimpipe" needs n >= p, any number beyond.
        slack: forwards in flight per hop, 1 or 2.
        policy: one of :data:`~thresher.pipeline.schedule.ops.POLICIES`.
        split_embedding: cut the input embedding by rows over the ranks.
        split_head: cut the output layer by rows over the ranks.
        split_backward: compute gradients of weights separately after the last forward.
        exchange: share attention between ranks by this rule; None for not at all.
        work: how much operations are, so that they fit; None for no attention and slices of equal length.

    Raises:
        ScheduleError: no such schedule exists; it says which argument is in the way.
    """
    shape = Shape(stages, chunks, microbatches, slices, slack, policy, split_embedding, split_head, split_backward)
    prices = Prices(shape.slices, work or Work())
    mains = main_lists(shape, compute_orders(shape))
    plans = _plans(shape, mains, prices, exchange)
    if not (split_embedding or split_head or split_backward):
        # There is nothing to place, and the plan itself has been weighed against none.
        return lower(shape, mains, prices, next(plans))
    best = min((place(shape, mains, prices, plan) for plan in plans), key=lambda placed: placed.span)
    return lower(shape, best.lists, prices, best.exchanges)


def _plans(shape: Shape, mains: Orders, prices: Prices, rule: ExchangeRule | None) -> Iterator[Exchanges]:
    """How attention may be shared, to be tried: as planned, and not at all."""
    if rule is not None:
        plan = plan_exchange(shape, mains, rule, prices)
        yield [
            {identity(ops[at]): _exchange(ops[at], *how) for at, how in shared.items()}
            for ops, shared in zip(mains, plan, strict=True)
        ]
    if rule is None or not rule.forced:
        yield [{} for _ in mains]


def _exchange(op: Op, peer: int, share: int, partner: tuple[int, int, int]) -> Op:
    kind = Kind.EXCHANGE_FORWARD if op.kind is Kind.FORWARD else Kind.EXCHANGE_BACKWARD
    return Op(kind, op.microbatch, op.chunk, op.slice, peer=peer, share=share, partner=partner)
