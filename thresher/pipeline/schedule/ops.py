"""What a schedule is made of.

A model of L layers is cut into p * v *stages* of consecutive layers. Stage s = chunk * p + rank lives on rank ``s % p``
as its chunk number ``s // p``. A step trains m microbatches; each is cut along the sequence into n slices, which visit
the stages one after the other:

    rank 0: F(0,0,0) F(0,0,1) ...                       (microbatch, chunk, slice)
              | activation
    rank 1:          F(0,0,0) F(0,0,1) ...
                        | activation, wrapping around to rank 0, chunk 1, when there is one

The input embedding (*rows*) and the output layer (*hidden*, *partial*, *normaliser*) may be cut by rows of the
vocabulary over all ranks; then they are operations of their own:

    EMBED on every rank --rows--> rank 0, chunk 0                                 before F(k, 0, i)
    rank 0 --row gradient--> EMBED_BACKWARD on every rank                         after  B(k, 0, i)
    last rank --hidden--> HEAD on every rank --partial--> LOSS on the last rank   after  F(k, v-1, i)
    LOSS --normaliser--> HEAD_WEIGHT on every rank;  LOSS before B(k, v-1, i)
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an operation does. Values are the spellings of JSON and CSV."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_BACKWARD = "I"
    """Backward without the gradients of weight matrices, which :attr:`WEIGHT_BACKWARD` computes later."""
    WEIGHT_BACKWARD = "W"
    EMBED = "E"
    """Looks up the rows of one slice's ids that this rank owns."""
    EMBED_BACKWARD = "EB"
    HEAD = "H"
    """This rank's rows of the output layer: partial gradient of the hidden state, statistics for the loss."""
    LOSS = "L"
    """On the last rank: merges the partial results into the loss and the gradient of the hidden state."""
    HEAD_WEIGHT = "HW"
    """Gradient of this rank's rows of the output layer."""
    EXCHANGE_FORWARD = "XF"
    """The next operation, a FORWARD, shares its attention with ``peer`` (see :class:`Op`)."""
    EXCHANGE_BACKWARD = "XB"
    """The next operation, a BACKWARD or INPUT_BACKWARD, shares its attention with ``peer``."""
    SEND = "S"
    """Starts a transfer; does not wait."""
    RECEIVE = "R"
    """Allocates a buffer and starts to receive; the operation that consumes it waits."""
    RELEASE = "D"
    """Waits for an earlier SEND, which its RECEIVE has met long before if ranks keep pace, and frees what was sent."""


class Payload(StrEnum):
    """What a transfer carries, always of one slice."""

    ACTIVATION = "act"
    """Output of stage s for stage s + 1: [B, T, D]. ``chunk`` is that of the *sending* stage."""
    GRADIENT = "grad"
    """Gradient of the input of stage s for stage s - 1: [B, T, D]. ``chunk`` is that of the *sending* stage."""
    ROWS = "rows"
    """Embedding rows from their owner for rank 0. ``chunk`` is 0."""
    ROW_GRADIENT = "rowgrad"
    """Their gradients from rank 0 to the owner. ``chunk`` is 0."""
    HIDDEN = "hidden"
    """Output of the last stage for the other ranks' heads. ``chunk`` is v - 1, as for the next two."""
    PARTIAL = "partial"
    """A head's partial gradient and statistics for the last rank."""
    NORMALISER = "norm"
    """What a head needs of the merged loss for the gradient of its rows, from the last rank."""


@dataclass(frozen=True, slots=True)
class Op:
    """One entry of a rank's list.

    Attributes:
        kind: what to do.
        microbatch: 0 <= microbatch < m.
        chunk: chunk of the rank that executes it (transfers: of the sending rank, see :class:`Payload`).
        slice: 0 <= slice < n.
        payload: of SEND, RECEIVE and RELEASE; None otherwise.
        peer: the other rank of a transfer or an exchange; -1 otherwise.
        share: of an exchange only: slices of the prefix whose keys and values are moved. Positive: this rank is the
            *giver*: it sends its ``share`` oldest slices to ``peer``, which computes attention over them for it.
            Negative: this rank is the *helper*.
        partner: of an exchange only: (microbatch, chunk, slice) of the operation of ``peer`` that is shared.
    """

    kind: Kind
    microbatch: int
    chunk: int
    slice: int
    payload: Payload | None = None
    peer: int = -1
    share: int = 0
    partner: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        place = f"microbatch {self.microbatch}, chunk {self.chunk}, slice {self.slice}"
        moved = f" {self.payload.name.lower()}" if self.payload else ""
        peer = f", peer {self.peer}" if self.peer >= 0 else ""
        return f"{self.kind.name.lower()}{moved} ({place}{peer})"


POLICIES = ("slimpipe", "gpipe", "1f1b", "interleaved", "terapipe", "seq1f1b")


@dataclass(frozen=True)
class Shape:
    """How large a schedule is: what every rank must agree on.

    Attributes:
        stages: ranks of the pipeline, p.
        chunks: stages per rank, v.
        microbatches: sequences (or batches of sequences) per step, m.
        slices: per microbatch, n.
        slack: forwards in flight per hop beyond the first rank's own, w: 1 or 2 (research: 2 hides transfers).
        policy: one of :data:`POLICIES`.
        split_embedding: the input embedding is cut by rows over the ranks; otherwise rank 0 has it inside its first
            chunk.
        split_head: the output layer is cut by rows over the ranks; otherwise the last rank has it, and LOSS is all.
        split_backward: after the last forward, backwards are split into INPUT_BACKWARD and WEIGHT_BACKWARD.
    """

    stages: int
    chunks: int
    microbatches: int
    slices: int
    slack: int = 2
    policy: str = "slimpipe"
    split_embedding: bool = False
    split_head: bool = False
    split_backward: bool = False

    def stage(self, rank: int, chunk: int) -> int:
        """Number of the stage that is ``chunk`` of ``rank``."""
        return chunk * self.stages + rank

    @property
    def last_stage(self) -> int:
        """Number of the stage whose output goes to the loss."""
        return self.stages * self.chunks - 1


@dataclass(frozen=True)
class Schedule:
    """The lists of all ranks.

    Attributes:
        shape: what it was built for.
        ranks: by rank, the operations in the order they are executed.
    """

    shape: Shape
    ranks: tuple[tuple[Op, ...], ...]

    def of(self, rank: int, *kinds: Kind) -> list[Op]:
        """Operations of ``rank``; all of them, or those of ``kinds``."""
        return [op for op in self.ranks[rank] if not kinds or op.kind in kinds]
