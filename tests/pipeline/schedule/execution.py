"""Executes schedules with tokens in place of tensors, knowing nothing of how they are built or validated.

Every rule of the runtime that matters for the result is here once more, written down from scratch: messages travel in
queues per edge, keys and values are stacks, and every wait is a wait. A schedule that gets through has trained each
slice once, on what it should have seen.
"""

from collections import Counter, defaultdict, deque

from thresher.pipeline.schedule.ops import Kind, Payload, Schedule


class Wrong(Exception):
    """The schedule hangs, or trains on the wrong thing."""


def execute(schedule: Schedule) -> None:
    """Raises :class:`Wrong` where anything is amiss."""
    _Execution(schedule).run()


class _Execution:
    def __init__(self, schedule):
        self.shape = schedule.shape
        self.lists = schedule.ranks
        self.at = [0] * len(schedule.ranks)
        self.made = [set() for _ in schedule.ranks]  # what a rank can send
        self.wire = defaultdict(deque)  # edge -> sent and not yet received
        self.posted = defaultdict(deque)  # edge -> received into, and not yet there
        self.here = [set() for _ in schedule.ranks]  # messages that arrived
        self.taken = Counter()  # edge, message -> posted, ever
        self.cache = defaultdict(list)  # rank, microbatch, chunk -> slices with keys and values
        self.done = [Counter() for _ in schedule.ranks]
        self.waits = {}  # rank -> exchange that its next operation takes part in

    def run(self):
        moved = True
        while moved:
            moved = any(self.advance(rank) for rank in range(len(self.lists)))
        if any(at < len(ops) for at, ops in zip(self.at, self.lists, strict=True)):
            raise Wrong("hangs")
        self.check_end()

    def advance(self, rank):
        start = self.at[rank]
        while self.at[rank] < len(self.lists[rank]) and self.attempt(rank, self.lists[rank][self.at[rank]]):
            self.at[rank] += 1
        return self.at[rank] > start

    def attempt(self, rank, op):
        place = (op.microbatch, op.chunk, op.slice)
        match op.kind:
            case Kind.SEND:
                if (op.payload, place) not in self.made[rank]:
                    raise Wrong(f"sends what is not made: {op}")
                self.wire[op.payload, rank, op.peer].append(place)
                return True
            case Kind.RECEIVE:
                self.posted[op.payload, op.peer, rank].append(place)
                self.taken[op.payload, op.peer, rank, place] += 1
                return True
            case Kind.RELEASE:
                return self.taken[op.payload, rank, op.peer, place] > 0
            case Kind.EXCHANGE_FORWARD | Kind.EXCHANGE_BACKWARD:
                self.waits[rank] = op
                return True
            case _:
                self.deliver(rank)
                return self.compute(rank, op, place)

    def deliver(self, rank):
        for (payload, source, destination), posted in self.posted.items():
            wire = self.wire[payload, source, destination]
            while destination == rank and posted and wire:
                expected, came = posted.popleft(), wire.popleft()
                if expected != came:
                    raise Wrong(f"rank {rank} takes {came} for {expected}")
                self.here[rank].add((payload, source, came))

    def compute(self, rank, op, place):
        wanted = list(self.wanted(rank, op.kind, *place))
        if any(item not in self.here[rank] for item in wanted) or not self.partner_is_there(rank, op, wanted):
            return False
        self.here[rank].difference_update(wanted)
        self.apply(rank, op.kind, *place)
        self.done[rank][op.kind, place] += 1
        return True

    def partner_is_there(self, rank, op, wanted):
        """Whether the other side of an exchange waits at its end, or has been through already."""
        mine = self.waits.get(rank)
        if mine is None:
            return True
        direction = (Kind.FORWARD,) if mine.kind is Kind.EXCHANGE_FORWARD else (Kind.BACKWARD, Kind.INPUT_BACKWARD)
        if op.kind not in direction or (op.microbatch, op.chunk, op.slice) != (
            mine.microbatch,
            mine.chunk,
            mine.slice,
        ):
            raise Wrong(f"an exchange for {op}")
        other = mine.peer
        if any(self.done[other][kind, mine.partner] for kind in direction):
            del self.waits[rank]
            return True
        theirs, place = self.waits.get(other), (mine.microbatch, mine.chunk, mine.slice)
        if theirs is None or (theirs.kind, theirs.peer, theirs.partner) != (mine.kind, rank, place):
            return False
        if theirs.share != -mine.share or not mine.share:
            raise Wrong("two sides of an exchange disagree")
        giver = mine.slice if mine.share > 0 else theirs.slice
        if abs(mine.share) > giver:
            raise Wrong("more slices move than there are")
        next_of_other = self.lists[other][self.at[other]]
        if (next_of_other.microbatch, next_of_other.chunk, next_of_other.slice) != mine.partner:
            return False
        self.deliver(other)
        if any(item not in self.here[other] for item in self.wanted(other, next_of_other.kind, *mine.partner)):
            return False
        del self.waits[rank]
        return True

    def wanted(self, rank, kind, k, c, i):
        """Messages that an operation consumes."""
        p, v = self.shape.stages, self.shape.chunks
        first, last = rank == c == 0, rank == p - 1 and c == v - 1
        match kind:
            case Kind.FORWARD if not first and p > 1:
                yield Payload.ACTIVATION, (rank - 1) % p, (k, c if rank else c - 1, i)
            case Kind.FORWARD if first and self.shape.split_embedding:
                yield from ((Payload.ROWS, other, (k, 0, i)) for other in range(1, p))
            case Kind.BACKWARD | Kind.INPUT_BACKWARD if not last and p > 1:
                yield Payload.GRADIENT, (rank + 1) % p, (k, c if rank < p - 1 else c + 1, i)
            case Kind.HEAD if rank < p - 1:
                yield Payload.HIDDEN, p - 1, (k, v - 1, i)
            case Kind.LOSS if self.shape.split_head:
                yield from ((Payload.PARTIAL, other, (k, v - 1, i)) for other in range(p - 1))
            case Kind.HEAD_WEIGHT if rank < p - 1:
                yield Payload.NORMALISER, p - 1, (k, v - 1, i)
            case Kind.EMBED_BACKWARD if rank:
                yield Payload.ROW_GRADIENT, 0, (k, 0, i)

    def apply(self, rank, kind, k, c, i):
        """What an operation needs of its own rank, and what it leaves behind."""
        place, p, v = (k, c, i), self.shape.stages, self.shape.chunks
        stack = self.cache[rank, k, c]
        first, last = rank == c == 0, rank == p - 1 and c == v - 1
        match kind:
            case Kind.FORWARD:
                if first and self.shape.split_embedding:
                    self.require(rank, Kind.EMBED, place)
                if p == 1 and c:
                    self.require(rank, Kind.FORWARD, (k, c - 1, i))
                if stack != list(range(i)):
                    raise Wrong(f"slice {i} sees {stack}")
                stack.append(i)
                self.made[rank].add((Payload.HIDDEN if last else Payload.ACTIVATION, place))
            case Kind.BACKWARD | Kind.INPUT_BACKWARD:
                if last:
                    self.require(rank, Kind.LOSS, place)
                elif p == 1:
                    self.require(rank, Kind.BACKWARD, (k, c + 1, i))
                if not stack or stack.pop() != i:
                    raise Wrong(f"backward of slice {i} is not that of the last one")
                self.made[rank].add((Payload.ROW_GRADIENT if first else Payload.GRADIENT, place))
            case Kind.WEIGHT_BACKWARD:
                self.require(rank, Kind.INPUT_BACKWARD, place)
            case Kind.EMBED:
                self.made[rank].add((Payload.ROWS, place))
            case Kind.EMBED_BACKWARD:
                self.require(rank, Kind.EMBED, place)
                if rank == 0:
                    self.require(rank, Kind.BACKWARD, place)
            case Kind.HEAD:
                if rank == p - 1:
                    self.require(rank, Kind.FORWARD, place)
                self.made[rank].add((Payload.PARTIAL, place))
            case Kind.LOSS:
                self.require(rank, Kind.HEAD if self.shape.split_head else Kind.FORWARD, place)
                self.made[rank].add((Payload.NORMALISER, place))
            case Kind.HEAD_WEIGHT:
                self.require(rank, Kind.HEAD, place)
                if rank == p - 1:
                    self.require(rank, Kind.LOSS, place)

    def require(self, rank, kind, place):
        kinds = (Kind.BACKWARD, Kind.INPUT_BACKWARD) if kind is Kind.BACKWARD else (kind,)
        if not any(self.done[rank][each, place] for each in kinds):
            raise Wrong(f"{kind.name} of {place} is not done on rank {rank}")

    def check_end(self):
        p, v, m, n = self.shape.stages, self.shape.chunks, self.shape.microbatches, self.shape.slices
        slices = [(k, i) for k in range(m) for i in range(n)]
        for rank, done in enumerate(self.done):
            expected = Counter()
            for k, i in slices:
                for c in range(v):
                    split = bool(done[Kind.INPUT_BACKWARD, (k, c, i)]) and self.shape.split_backward
                    back = (Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD) if split else (Kind.BACKWARD,)
                    expected.update((kind, (k, c, i)) for kind in (Kind.FORWARD, *back))
                if self.shape.split_embedding:
                    expected.update((kind, (k, 0, i)) for kind in (Kind.EMBED, Kind.EMBED_BACKWARD))
                if self.shape.split_head:
                    expected.update((kind, (k, v - 1, i)) for kind in (Kind.HEAD, Kind.HEAD_WEIGHT))
                if rank == p - 1:
                    expected[Kind.LOSS, (k, v - 1, i)] += 1
            if +done != expected:
                raise Wrong(f"rank {rank} did {+done - expected} too much, {expected - +done} too little")
        left = [queue for queues in (self.wire, self.posted) for queue in queues.values() if queue]
        if left or any(self.here) or self.waits:
            raise Wrong("something is left over")
