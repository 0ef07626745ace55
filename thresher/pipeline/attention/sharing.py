"""What two ranks move when they share the attention of one operation: both derive it from the giver's layout."""

from dataclasses import dataclass

from thresher.pipeline.attention.port import Port
from thresher.pipeline.attention.regions import moved
from thresher.pipeline.layout import Layout


@dataclass(frozen=True)
class Deal:
    """One exchange in which something moves.

    Attributes:
        port: the line to the peer.
        gives: whether this rank is the giver.
        tokens: of the giver's microbatch whose keys and values move.
        queries: tokens of the giver's slice that look back at them, T': its first segment.
        batch: rows of the giver's microbatch, B.
    """

    port: Port
    gives: bool
    tokens: range
    queries: int
    batch: int


def find_deal(port: Port | None, layout: Layout, index: int) -> Deal | None:
    """What ``port`` moves for slice ``index`` of this rank's microbatch, cut by ``layout``; None for nothing."""
    if port is None or port.share == 0:
        return None
    gives = port.share > 0
    if not gives:
        layout, index = port.partner.layout, port.partner_slice
    tokens = moved(layout, index, abs(port.share))
    return Deal(port, gives, tokens, layout.segments(index)[0].end, layout.batch) if tokens else None
