"""Which operations share their attention (context exchange, arXiv 2504.14519): the plan, made once for all ranks.

Late slices of a sequence attend to more tokens than early ones. While rank 0 works at a late slice, the last rank works
at an earlier one, and waits. So two operations that run at the same time on two ranks share their attention: the
*giver* moves its oldest slices of keys and values to the *helper* (see :mod:`thresher.pipeline.attention.port`).

The plan is found by a walk over the lists of all ranks in lock step:

    round       0     1     2     3            operations of one round and one direction are a cohort;
    rank 0     F 0   F 1   F 2   F 3   ...     its costliest pairs with the one that brings the later end
    rank 1           F 0   F 1   F 2   ...     of both forward most, then the second costliest, and so on
    rank 2                 F 0   F 1   ...

Both of a pair belong to one round and everything they need belongs to earlier ones, so that operations which start
together never wait for each other in a circle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from thresher.errors import ScheduleError
from thresher.pipeline.schedule.graph import MAIN, identity, needs
from thresher.pipeline.schedule.ops import Kind, Op, Shape
from thresher.pipeline.schedule.work import ATTENTION, Prices


@dataclass(frozen=True)
class ExchangeRule:
    """When two operations share their attention.

    Costs are in units of :class:`~thresher.pipeline.schedule.work.Work`. Backward is taken to cost twice as much.

    Attributes:
        limit: most slices one operation moves; 0 for no limit.
        forced: move at least one slice wherever two operations can be paired, also where it does not pay. For tests.
        transfer: of the keys and values of one slice of average length.
        latency: of sharing one operation at all.
    """

    limit: int = 0
    forced: bool = False
    transfer: float = 0.02
    latency: float = 0.02

    def __post_init__(self) -> None:
        for name in ("limit", "transfer", "latency"):
            if getattr(self, name) < 0:
                raise ScheduleError(f"{name} is {getattr(self, name)}", where="exchange", fix="give 0 or more")


class Shared(NamedTuple):
    """How one operation is shared; fields as in :class:`~thresher.pipeline.schedule.ops.Op`."""

    peer: int
    share: int
    partner: tuple[int, int, int]


Plan = tuple[dict[int, Shared], ...]
"""By rank: position in its list of compute operations -> how that one is shared."""


def plan_exchange(shape: Shape, orders: Sequence[Sequence[Op]], rule: ExchangeRule, prices: Prices) -> Plan:
    """The plan with the shortest step that the rule allows: empty where sharing does not pay.

    The paper's code pairs the operation with most cached slices with the one with fewest and moves half the difference.
    Here both are weighed by the cost model, waiting for each other and the transfer included. Several weightings are
    tried; the one whose step is shortest is taken, or none.

    Args:
        shape: with policy "slimpipe".
        orders: compute operations of every rank, in order. FORWARD, BACKWARD and INPUT_BACKWARD may be shared; others
            may be left out.
        rule: costs and limits of sharing.
        prices: what operations cost.

    Returns:
        The plan: each entry has exactly one counterpart, with the opposite share and of the same direction. Operations
        that start together are of chunks that may differ; the runtime has to see that those hold equally many layers.

    Raises:
        ScheduleError: another policy; lengths for another number of slices; orders that wait in a circle.
    """
    if shape.policy != "slimpipe":
        raise ScheduleError(f"policy '{shape.policy}' has no exchange", where="exchange", fix="use policy 'slimpipe'")
    costs = _Costs(prices, rule)
    lists = _Lists(shape, orders)
    if rule.forced:
        return _share_out(lists, list(lists.cohorts(_BACK_AND_FORTH)), costs, _TASTES[0]).plan
    # With slack 1, neighbours are out of phase: one goes back while the other goes forth.
    cohorts = list(lists.cohorts(_EITHER if shape.slack == 1 else _BACK_AND_FORTH))
    outcomes = [_share_out(lists, cohorts, costs, taste) for taste in (None, *_TASTES)]
    return min(outcomes, key=lambda outcome: outcome.span).plan


class _Taste(NamedTuple):
    """How partners are chosen.

    Attributes:
        by_cost: the costliest of a cohort chooses first, not the one that ends last.
        delay: how much a later end of the helper counts against an earlier end of the giver.
    """

    by_cost: bool
    delay: float


_TASTES = tuple(_Taste(by_cost, delay) for by_cost in (True, False) for delay in (0.1, 0.25, 0.75))


class _Costs:
    """What two operations take together, and how much of one is best moved."""

    def __init__(self, prices: Prices, rule: ExchangeRule) -> None:
        self.prices = prices
        self.rule = rule
        self._best: dict[tuple[int, int], int] = {}

    def together(self, giver: Op, helper: Op, share: int) -> tuple[float, float]:
        """Costs of both where ``share`` slices move."""
        moved = self.prices.moved(giver.kind, giver.slice, share)
        transfer = ATTENTION[giver.kind] * (self.rule.latency + self.rule.transfer * self.prices.before[share])
        return self.prices.alone(giver) - moved + transfer, self.prices.alone(helper) + moved + transfer

    def best_share(self, giver: Op, helper: Op) -> int:
        """How many slices to move so that the longer of both is shortest; 0 where the giver has none to move."""
        key = giver.slice, helper.slice
        if key not in self._best:
            most = min(giver.slice, self.rule.limit or giver.slice)
            shares = range(1, most + 1)
            self._best[key] = min(shares, key=lambda share: max(self.together(giver, helper, share)), default=0)
        return self._best[key]


_Place = tuple[int, int]
"""Rank, and position in its list."""

_BACK_AND_FORTH = (MAIN - {Kind.FORWARD}, frozenset({Kind.FORWARD}))
_EITHER = (MAIN,)


class _Lists:
    """Compute operations of all ranks with what each waits for."""

    def __init__(self, shape: Shape, orders: Sequence[Sequence[Op]]) -> None:
        places = {(r, identity(op)): (r, i) for r, order in enumerate(orders) for i, op in enumerate(order)}
        self.orders = orders
        self._needs = [
            [[places[rank, op] for rank, op, _ in needs(shape, r, done) if (rank, op) in places] for done in order]
            for r, order in enumerate(orders)
        ]

    def at(self, place: _Place) -> Op:
        """The operation at ``place``."""
        return self.orders[place[0]][place[1]]

    def cohorts(self, phases: Sequence[frozenset[Kind]]) -> Iterator[list[_Place]]:
        """All operations, in an order in which they can be executed; those of one list may start together.

        Args:
            phases: what a rank does in one round: at most one operation of each.
        """
        done = [0] * len(self.orders)
        while any(at < len(order) for at, order in zip(done, self.orders, strict=True)):
            before = list(done)
            for kinds in phases:
                yield from self._others(done)
                ready = [place for place in enumerate(done) if self._may_start(place, done, kinds)]
                for rank, _ in ready:
                    done[rank] += 1
                for forward in (False, True):
                    yield [place for place in ready if (self.at(place).kind is Kind.FORWARD) == forward]
            yield from self._others(done)
            if done == before:
                raise self._stuck(done)

    def _others(self, done: list[int]) -> Iterator[list[_Place]]:
        """What is no forward and no backward, as far as it goes; ``done`` follows."""
        others = frozenset(Kind) - MAIN
        while ready := [place for place in enumerate(done) if self._may_start(place, done, others)]:
            for place in ready:
                done[place[0]] += 1
                yield [place]

    def _may_start(self, place: _Place, done: Sequence[int], kinds: frozenset[Kind]) -> bool:
        rank, at = place
        order = self.orders[rank]
        return at < len(order) and order[at].kind in kinds and all(done[r] > i for r, i in self._needs[rank][at])

    def ready(self, place: _Place, ends: Sequence[Sequence[float]]) -> float:
        """When ``place`` may start, from the ends of everything before it."""
        rank, at = place
        own = ends[rank][at - 1] if at else 0.0
        return max([own, *(ends[r][i] for r, i in self._needs[rank][at])])

    def _stuck(self, done: Sequence[int]) -> ScheduleError:
        left = [place for place in enumerate(done) if place[1] < len(self.orders[place[0]])]
        stuck = [f"rank {place[0]} at {self.at(place)}" for place in left]
        return ScheduleError(f"operations wait for each other in a circle: {'; '.join(stuck)}", where="exchange")


class _Outcome(NamedTuple):
    span: float
    plan: Plan


def _share_out(lists: _Lists, cohorts: Sequence[list[_Place]], costs: _Costs, taste: _Taste | None) -> _Outcome:
    """The plan after ``taste``, and the length of its step; without taste nothing is shared."""
    ends: list[list[float]] = [[] for _ in lists.orders]
    plan: Plan = tuple({} for _ in lists.orders)
    for cohort in cohorts:
        table = _Cohort(lists, costs, {place: lists.ready(place, ends) for place in cohort})
        if taste:
            table.pair_up(taste, plan)
        for rank, at in cohort:
            ends[rank].append(table.ends[rank, at])
    return _Outcome(max(end[-1] for end in ends if end), plan)


class _Offer(NamedTuple):
    score: float
    helper: _Place
    share: int
    ends: tuple[float, float]


class _Cohort:
    """Operations that may start together; ``ends`` is when each ends."""

    def __init__(self, lists: _Lists, costs: _Costs, ready: dict[_Place, float]) -> None:
        self.lists, self.costs, self.ready = lists, costs, ready
        self.ends = {place: start + costs.prices.alone(lists.at(place)) for place, start in ready.items()}

    def pair_up(self, taste: _Taste, plan: Plan) -> None:
        """Enters pairs into ``plan`` and changes ``ends`` accordingly."""
        costs = {place: self.costs.prices.alone(self.lists.at(place)) for place in self.ready}
        ranks = costs if taste.by_cost else self.ends
        left = sorted(self.ready, key=lambda place: (ranks[place], place))
        while len(left) > 1:
            giver = left.pop()
            offer = min((o for o in (self._offer(giver, helper, taste) for helper in left) if o), default=None)
            if offer:
                left.remove(offer.helper)
                self._enter(giver, offer, plan)

    def _offer(self, giver: _Place, helper: _Place, taste: _Taste) -> _Offer | None:
        """What ``helper`` could do; None where that does not pay."""
        ops = self.lists.at(giver), self.lists.at(helper)
        share = self.costs.best_share(*ops)
        if not share:
            return None
        start = max(self.ready[giver], self.ready[helper])
        first, second = (start + cost for cost in self.costs.together(*ops, share))
        if max(first, second) >= self.ends[giver] and not self.costs.rule.forced:
            return None
        return _Offer(max(first, second) + taste.delay * (second - self.ends[helper]), helper, share, (first, second))

    def _enter(self, giver: _Place, offer: _Offer, plan: Plan) -> None:
        for place, other, share in ((giver, offer.helper, offer.share), (offer.helper, giver, -offer.share)):
            op = self.lists.at(other)
            plan[place[0]][place[1]] = Shared(other[0], share, (op.microbatch, op.chunk, op.slice))
        self.ends[giver], self.ends[offer.helper] = offer.ends
