"""How long a message between two ranks of a pipeline takes."""

from dataclasses import dataclass
from typing import Protocol


class Wire(Protocol):
    """Anything that says how long messages take: :class:`Link`, :class:`Nodes`."""

    def seconds(self, source: int, target: int, size_bytes: float) -> float:
        """How long ``size_bytes`` are under way from rank ``source`` to rank ``target``."""


@dataclass(frozen=True)
class Link:
    """A line with one message under way per direction and payload; the default is free.

    Attributes:
        latency_s: seconds from the moment both ends are there to the first byte.
        bytes_per_s: bandwidth.
    """

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def seconds(self, source: int, target: int, size_bytes: float) -> float:
        """How long ``size_bytes`` are under way from rank ``source`` to rank ``target``: the same on every edge."""
        return self.latency_s + size_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Nodes:
    """Lines of a cluster, where neighbours on one node are closer than others.

    Attributes:
        inside: the line between ranks of one node.
        across: the line between nodes.
        ranks_per_node: consecutive ranks of the pipeline that share a node.
    """

    inside: Link
    across: Link
    ranks_per_node: int

    def seconds(self, source: int, target: int, size_bytes: float) -> float:
        """How long ``size_bytes`` are under way from rank ``source`` to rank ``target``."""
        same = source // self.ranks_per_node == target // self.ranks_per_node
        return (self.inside if same else self.across).seconds(source, target, size_bytes)


INSTANT = Link()
"""Messages take no time."""
