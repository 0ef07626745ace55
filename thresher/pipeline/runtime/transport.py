"""Messages between the ranks of a pipeline: never waited for without a deadline, never lost without a name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.errors import PipelineStalled, ScheduleError
from thresher.pipeline.attention.port import Arriving, Port
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.groups import EXCHANGES, Groups
from thresher.pipeline.runtime.ledger import Ledger

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor to come."""


@dataclass
class Transfer(Arriving):
    """Tensors under way in one direction.

    Attributes:
        what: for messages to the user.
        kind: of the ledger.
    """

    transport: "Transport"
    tensors: list[Tensor]
    works: list[dist.Work]
    what: str
    kind: str

    def wait(self) -> list[Tensor]:
        """Waits until all are over."""
        for work in self.works:
            self.transport.wait(work, self.what)
        self.transport.ledger.add(self.kind, -_bytes(self.tensors))
        self.works, tensors, self.tensors = [], self.tensors, []
        return tensors


class Transport:
    """Sends and receives on the groups of one pipeline.

    Attributes:
        now: what this rank is doing, for messages to the user.
    """

    def __init__(self, groups: Groups | None, timeout: timedelta, ledger: Ledger, device: torch.device) -> None:
        self._groups, self.timeout, self.ledger, self._device = groups, timeout, ledger, device
        self.now = "the beginning of a step"

    @property
    def groups(self) -> Groups:
        """The groups; a pipeline of one rank has none and sends nothing."""
        assert self._groups is not None
        return self._groups

    def require_same(self, fact: int, what: str) -> None:
        """Refuses ranks that do not agree. Collective.

        Args:
            fact: 63 bits that must be the same on every rank.
            what: its name, for the message.

        Raises:
            ScheduleError: names the ranks that differ from rank 0.
        """
        if self._groups is None:
            return
        mine, group = torch.tensor([fact], device=self._device), self._groups.control
        facts = [torch.empty_like(mine) for _ in self._groups.ranks]
        self._collective(lambda: dist.all_gather(facts, mine, group=group, async_op=True), what)
        others = [rank for rank, fact in enumerate(facts) if int(fact) != int(facts[0])]
        if others:
            raise ScheduleError(
                f"ranks {', '.join(map(str, others))} have another {what} than rank 0",
                where="pipeline",
                fix="start every rank with the same configuration and hand it the same microbatches",
            )

    def share(self, tensor: Tensor, source: int) -> None:
        """Overwrites ``tensor`` with that of rank ``source`` of the pipeline. Collective."""
        if self._groups is not None:
            root, group = self._groups.ranks[source], self._groups.control
            self._collective(lambda: dist.broadcast(tensor, root, group=group, async_op=True), "the loss of the step")

    def _collective(self, start: Callable[[], dist.Work | None], what: str) -> None:
        try:
            work = start()
        except (RuntimeError, dist.DistError) as error:
            raise self.stalled(what, error) from error
        assert work is not None
        self.wait(work, what)

    def send(self, name: str, peer: int, tensors: Sequence[Tensor], what: str) -> Transfer:
        """Starts to send contiguous tensors on channel ``name`` to rank ``peer`` of the pipeline."""
        group, target = self.groups.channels[name], self.groups.ranks[peer]
        kept = [tensor.contiguous() for tensor in tensors]
        text = f"{what} to be taken by rank {peer}"
        works = [self._start(dist.isend, tensor, target, group, text) for tensor in kept]
        self.ledger.add("sending", _bytes(kept))
        return Transfer(self, kept, works, text, "sending")

    def receive(self, name: str, peer: int, specs: Sequence[Spec], what: str) -> Transfer:
        """Starts to receive tensors of ``specs``, in the order they are sent."""
        group, source = self.groups.channels[name], self.groups.ranks[peer]
        buffers = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in specs]
        text = f"{what} from rank {peer}"
        works = [self._start(dist.irecv, tensor, source, group, text) for tensor in buffers]
        self.ledger.add("receiving", _bytes(buffers))
        return Transfer(self, buffers, works, text, "receiving")

    def wait(self, work: dist.Work, what: str) -> None:
        """Waits for ``work``.

        Raises:
            PipelineStalled: it took longer than the deadline, or the peer is gone.
        """
        try:
            if self._device.type == "cpu":
                work.wait(self.timeout)
            else:  # the stream waits; the group's own timeout ends what hangs
                work.wait()
        except (RuntimeError, dist.DistError) as error:
            raise self.stalled(what, error) from error

    def stalled(self, what: str, error: Exception) -> PipelineStalled:
        """The error to raise when ``what`` does not come."""
        limit = f"{self.timeout.total_seconds():g} s"
        return PipelineStalled(
            f"waited up to {limit} for {what}: {str(error).splitlines()[0]:.200}",
            where=f"rank {self.groups.rank}, {self.now}",
            fix="look at the log of that rank; if it was only slow, raise pipeline.timeout_s",
        )

    def _start(self, function: object, tensor: Tensor, peer: int, group: dist.ProcessGroup, what: str) -> dist.Work:
        try:
            work = function(tensor, peer, group=group)  # type: ignore[operator]
        except (RuntimeError, dist.DistError) as error:
            raise self.stalled(what, error) from error
        assert isinstance(work, dist.Work)
        return work


class ExchangePort(Port):
    """The line of one shared operation over a :class:`Transport`.

    Args:
        share: slices moved; positive for the giver.
        peer: rank of the pipeline at the other end.
    """

    def __init__(self, transport: Transport, peer: int, share: int, partner: Microbatch, partner_slice: int) -> None:
        self.share, self.partner, self.partner_slice = share, partner, partner_slice
        self._transport, self._peer, self._sent = transport, peer, list[Transfer]()
        there, back = EXCHANGES
        self._out, self._in = (there, back) if share > 0 else (back, there)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Starts to send; what was sent is kept until :meth:`finish`."""
        self._sent.append(self._transport.send(self._out, self._peer, tensors, "attention work"))

    def receive(self, shapes: Sequence[Spec]) -> Arriving:
        """Starts to receive."""
        return self._transport.receive(self._in, self._peer, shapes, "attention work")

    def finish(self) -> None:
        """Waits until all that was sent is taken: the peer needs it in the operation that this one shares."""
        for transfer in self._sent:
            transfer.wait()
        self._sent.clear()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
