"""How long each operation of a schedule takes: by a model of tokens and attention pairs, or as measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from thresher.pipeline.schedule.ops import Kind, Op, Payload, Shape
from thresher.pipeline.schedule.work import Work

TOKENS = 4096
"""Tokens of a slice of uniform cost: a power of two, so that times stay exact in binary."""


class Sample(NamedTuple):
    """One measurement.

    Attributes:
        tokens: the operation worked on.
        pairs: of a query and a key at or before it.
        seconds: it took.
    """

    tokens: float
    pairs: float
    seconds: float


@dataclass(frozen=True)
class Term:
    """Seconds of one layer on one slice: ``fixed + per_token * tokens + per_pair * pairs``."""

    per_token: float = 0.0
    per_pair: float = 0.0
    fixed: float = 0.0

    def seconds(self, tokens: float, pairs: float) -> float:
        """Of a slice of ``tokens`` tokens that attends to ``pairs`` pairs."""
        return self.fixed + self.per_token * tokens + self.per_pair * pairs

    def scaled(self, factor: float) -> "Term":
        """``factor`` times as long."""
        return Term(self.per_token * factor, self.per_pair * factor, self.fixed * factor)

    @staticmethod
    def fit(samples: Iterable[Sample]) -> "Term":
        """The non-negative term with the least squared *relative* errors; at least one sample."""
        from scipy.optimize import nnls  # takes longer to load than most schedules to simulate

        table = np.array([tuple(sample) for sample in samples], dtype=np.float64)
        seconds = table[:, 2:]
        rows = np.hstack([table[:, :2], np.ones_like(seconds)]) / seconds
        # nnls stops early on columns whose sizes differ by many orders of magnitude.
        scale = np.maximum(np.abs(rows).max(axis=0), np.finfo(np.float64).tiny)
        found = nnls(rows / scale, np.ones(len(rows)))[0] / scale
        return Term(*(float(value) for value in found))


FREE = Term()


@dataclass(frozen=True)
class Traffic:
    """Bytes that messages hold per token; nothing by default.

    Attributes:
        hidden: a hidden state or its gradient, also of the embedding.
        statistics: what a part of the output layer adds to the gradient it sends.
        normaliser: what the last rank sends back.
        key_value: keys and values of one layer, as an exchange moves them.
        query: queries of one layer; an attention output is as large.
    """

    hidden: float = 0.0
    statistics: float = 0.0
    normaliser: float = 0.0
    key_value: float = 0.0
    query: float = 0.0

    def per_token(self, payload: Payload) -> float:
        """Bytes of a message of ``payload`` per token."""
        if payload is Payload.NORMALISER:
            return self.normaliser
        return self.hidden + (self.statistics if payload is Payload.PARTIAL else 0.0)


@dataclass(frozen=True)
class Costs:
    """Seconds of every operation, and bytes of every message, of one microbatch (all are alike).

    Attributes:
        bounds: n + 1 rising token offsets from 0, as in :class:`thresher.pipeline.layout.Layout`.
        forward, backward, input_backward, weight_backward: per layer.
        layers: by stage; one each where it is empty.
        embed, embed_backward: the whole input embedding.
        head, head_weight: the whole output layer: logits with the gradient of the hidden state, gradient of its rows.
        loss: merging the parts.
        batch: rows of a microbatch, B.
        traffic: sizes of messages.
        measured: seconds by (kind, stage, slice), instead of the model where there is an entry. For an operation that
            is no stage's the stage counts as 0.
    """

    bounds: tuple[int, ...]
    forward: Term
    backward: Term
    input_backward: Term = FREE
    weight_backward: Term = FREE
    layers: tuple[int, ...] = ()
    embed: Term = FREE
    embed_backward: Term = FREE
    head: Term = FREE
    head_weight: Term = FREE
    loss: Term = FREE
    batch: int = 1
    traffic: Traffic = Traffic()
    measured: Mapping[tuple[Kind, int, int], float] = field(default_factory=dict)

    @staticmethod
    def uniform(slices: int, *, attention: float = 0.0) -> "Costs":
        """Forward 1, backward 2 (input and weights 1 each), everything else 0: times are exact in binary.

        Args:
            slices: n.
            attention: mean cost of attention over that of the rest: slice i costs 1 + attention * (2i + 1) / n.
        """
        tokens = TOKENS * slices
        per_pair = attention * slices / causal_pairs(0, tokens)
        once = Term(1 / TOKENS, per_pair)
        # The gradient of attention has no weights in it, so all of it is in the input part.
        return Costs(
            bounds=tuple(range(0, tokens + 1, TOKENS)),
            forward=once,
            backward=once.scaled(2),
            input_backward=Term(1 / TOKENS, 2 * per_pair),
            weight_backward=Term(1 / TOKENS),
        )

    @staticmethod
    def fit(
        bounds: Sequence[int], samples: Mapping[Kind, Sequence[Sample]], *, layers: Sequence[int] = (), batch: int = 1
    ) -> "Costs":
        """Terms by least squares from measurements of single layers, and of whole embeddings and output layers.

        Args:
            bounds: of the slices to be predicted; samples may be of any.
            samples: of FORWARD and BACKWARD at least; kinds that are left out cost nothing.
            layers: by stage.
            batch: rows of a microbatch.
        """
        found = {
            # Embedding and output layer have no attention, whatever a fit might make of its pairs.
            kind: Term.fit(of_kind if kind in LAYERED else [sample._replace(pairs=0.0) for sample in of_kind])
            for kind, of_kind in samples.items()
        }
        return Costs(
            bounds=tuple(bounds),
            forward=found[Kind.FORWARD],
            backward=found[Kind.BACKWARD],
            input_backward=found.get(Kind.INPUT_BACKWARD, FREE),
            weight_backward=found.get(Kind.WEIGHT_BACKWARD, FREE),
            layers=tuple(layers),
            embed=found.get(Kind.EMBED, FREE),
            embed_backward=found.get(Kind.EMBED_BACKWARD, FREE),
            head=found.get(Kind.HEAD, FREE),
            head_weight=found.get(Kind.HEAD_WEIGHT, FREE),
            loss=found.get(Kind.LOSS, FREE),
            batch=batch,
        )

    def work(self, stages: int) -> Work:
        """What a schedule for ``stages`` ranks has to know of these costs: forward terms of equally many layers."""
        slices = len(self.bounds) - 1
        mean = self.batch * self.bounds[-1] / slices
        linear = self.forward.seconds(mean, 0)
        attention = self.forward.per_pair * self.batch * causal_pairs(0, self.bounds[-1]) / slices
        depth = sum(self.layers) / len(self.layers) if self.layers else 1.0
        return Work(
            attention=attention / linear,
            tokens=tuple(float(high - low) for low, high in pairwise(self.bounds)),
            head=self.head.seconds(mean, 0) / stages / (depth * linear),
        )

    def tokens(self, index: int) -> int:
        """Tokens of slice ``index``, B * T."""
        return self.batch * (self.bounds[index + 1] - self.bounds[index])

    def pairs(self, index: int) -> int:
        """Pairs of a query in slice ``index`` and a key at or before it."""
        return self.batch * causal_pairs(self.bounds[index], self.bounds[index + 1])

    def depth(self, stage: int) -> int:
        """Layers of ``stage``."""
        return self.layers[stage] if self.layers else 1

    def seconds(self, shape: Shape, rank: int, op: Op) -> float:
        """How long ``rank`` computes ``op``, whose attention is not shared; 0 for operations that do not compute."""
        is_layered = op.kind in LAYERED
        stage = shape.stage(rank, op.chunk) if is_layered else 0
        known = self.measured.get((op.kind, stage, op.slice))
        if known is not None:
            return known
        tokens, pairs = self.tokens(op.slice), self.pairs(op.slice)
        if not is_layered:
            return sum(term.seconds(tokens, 0) / parts for term, parts in self._outside(shape, op.kind))
        layers = self.depth(stage) * self._layer(op.kind).seconds(tokens, pairs)
        return layers + self._front(shape, stage, op.kind).seconds(tokens, 0)

    def moved_seconds(self, shape: Shape, giver: int, op: Op, share: int) -> float:
        """What attention of ``op`` of rank ``giver`` over its ``share`` oldest slices takes."""
        pairs = self.tokens(op.slice) * self.bounds[share]
        return self.depth(shape.stage(giver, op.chunk)) * self._layer(op.kind).per_pair * pairs

    def around_attention(self, op: Op) -> float:
        """What one layer of ``op`` takes without its attention."""
        return self._layer(op.kind).seconds(self.tokens(op.slice), 0)

    def message_bytes(self, op: Op) -> float:
        """Size of what SEND ``op`` sends."""
        return self.traffic.per_token(op.payload) * self.tokens(op.slice) if op.payload else 0.0

    def exchange_bytes(self, kind: Kind, index: int, share: int) -> tuple[float, float]:
        """Bytes per layer that a giver at slice ``index`` sends, and that it gets back (``attention/port.py``)."""
        moved = self.traffic.key_value * self.batch * self.bounds[share]
        query = self.traffic.query * self.tokens(index)
        return (moved + query, query) if kind is Kind.FORWARD else (moved + 3 * query, moved + query)

    def _layer(self, kind: Kind) -> Term:
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT_BACKWARD: self.input_backward,
            Kind.WEIGHT_BACKWARD: self.weight_backward,
        }[kind]

    def _front(self, shape: Shape, stage: int, kind: Kind) -> Term:
        """The embedding, where the first stage has it inside."""
        if stage > 0 or shape.split_embedding or kind is Kind.WEIGHT_BACKWARD:
            return FREE
        return self.embed if kind is Kind.FORWARD else self.embed_backward

    def _outside(self, shape: Shape, kind: Kind) -> list[tuple[Term, int]]:
        """Terms of an operation that is no stage's, and into how many equal parts each is cut."""
        whole_head = [] if shape.split_head else [(self.head, 1), (self.head_weight, 1)]
        return {
            Kind.EMBED: [(self.embed, shape.stages)],
            Kind.EMBED_BACKWARD: [(self.embed_backward, shape.stages)],
            Kind.HEAD: [(self.head, shape.stages)],
            Kind.HEAD_WEIGHT: [(self.head_weight, shape.stages)],
            Kind.LOSS: [(self.loss, 1), *whole_head],
        }.get(kind, [])


LAYERED = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD})
"""Operations of a stage; the others are of the embedding or the output layer."""


def causal_pairs(first: int, last: int) -> int:
    """Pairs of a query among tokens first .. last - 1 and a key at or before it.

    >>> causal_pairs(2, 4)
    7
    """
    return (last * (last + 1) - first * (first + 1)) // 2


def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each of ``stages`` stages, as equal as possible, the longer ones first."""
    short, longer = divmod(layers, stages)
    return tuple(short + (stage < longer) for stage in range(stages))


def balanced_bounds(tokens: int, slices: int, term: Term, *, multiple: int = 1) -> tuple[int, ...]:
    """Bounds of slices of equal cost by ``term`` (Seq1F1B, arXiv:2406.03488): shorter and shorter ones.

    Args:
        tokens: S; at least ``slices * multiple``.
        slices: n.
        term: cost of a layer.
        multiple: bounds but the last are multiples of this.
    """
    grid = np.arange(0, tokens + 1, multiple, dtype=np.float64)
    spent = term.per_token * grid + term.per_pair * grid * (grid + 1) / 2
    total = term.seconds(tokens, causal_pairs(0, tokens)) - term.fixed
    wanted = total * np.arange(1, slices) / slices
    inner = [multiple * int(np.abs(spent - share).argmin()) for share in wanted]
    bounds = (0, *inner, tokens)
    if any(low >= high for low, high in pairwise(bounds)):
        raise ValueError(f"{slices} slices of {tokens} tokens in steps of {multiple} cannot be balanced")
    return bounds
