"""A timeline as one HTML page with an SVG picture, to be looked at in any browser; nothing is loaded from elsewhere.

One row per rank: what it computes, and below how much of a microbatch's activations it holds. Forwards are light,
backwards dark; the hue is the microbatch, later chunks are deeper, the number is the slice. Everything else about an
operation (when, how long, what it waited for, messages, exchange) is in its tooltip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

from thresher.pipeline.schedule.graph import EXCHANGES, needs
from thresher.pipeline.schedule.ops import Kind, Op, Payload, Shape
from thresher.pipeline.simulate.costs import LAYERED
from thresher.pipeline.simulate.memory import Memory
from thresher.pipeline.simulate.timeline import Event, Timeline, Transfer

LEFT, TOP, RIGHT = 76.0, 30.0, 16.0
LANE, CURVE, GAP = 30.0, 26.0, 14.0
HUES = (212, 28, 150, 330, 48, 268, 182, 0)
"""Of microbatches, in turn."""
NARROWEST_NUMBER = 9.0
"""Pixels below which an operation shows no number."""

SENTENCE = (
    "Each box is one slice of a sequence passing through one chunk of layers, forward (light) or backward (dark); "
    "empty places are time in which a rank waits. Below each rank: the activations it holds. Point at anything to read "
    "more."
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6879; --line: #d9dee6; --paper: #ffffff; --idle: #f1f3f6;
  --hold: #7b8aa3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf1; --soft: #9aa6b8; --line: #343c49; --paper: #151a21;
  --idle: #1e252f; --hold: #8494ad; } }
body { margin: 2rem auto; padding: 0 1.5rem; max-width: 1500px; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; } p { color: var(--soft); margin: .25rem 0 1rem; max-width: 75ch; }
.numbers { display: flex; flex-wrap: wrap; gap: 2.25rem; margin: 1rem 0; }
.numbers b { display: block; font-size: 1.6rem; line-height: 1.2; } .numbers span { color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
svg { display: block; font: 11px system-ui, sans-serif; } svg text { fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .idle { fill: var(--idle); } svg .grid { stroke: var(--line); }
svg .hold { fill: var(--hold); fill-opacity: .45; stroke: var(--hold); }
svg .even { stroke: var(--soft); stroke-dasharray: 4 4; }
svg rect.op { stroke: var(--paper); stroke-width: .75; } svg rect.op:hover { stroke: var(--ink); stroke-width: 1.5; }
svg .shared { fill: #10151d; pointer-events: none; } svg .shared.dark { fill: #ffffff; }
svg .number { text-anchor: middle; dominant-baseline: central; pointer-events: none; font-size: 10px; fill: #10151d; }
svg .number.dark { fill: #ffffff; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; margin: .75rem 0 1.5rem; color: var(--soft); }
.legend i { display: inline-block; width: 1.1em; height: .9em; margin-right: .4em; border-radius: 2px;
  vertical-align: -1px; }
table { border-collapse: collapse; } td, th { text-align: right; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; }
"""


def html(timeline: Timeline, memory: Memory, whole_bytes: float, title: str, *, in_seconds: bool = True) -> str:
    """The page.

    Args:
        timeline: to draw.
        memory: predicted for it.
        whole_bytes: of what the curves are shares of: M_a, one microbatch through all layers.
        title: plain text.
        in_seconds: times are seconds; otherwise plain numbers.
    """
    unit = time_unit(timeline.makespan) if in_seconds else PLAIN
    return "".join(
        (
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>",
            f"<p>{SENTENCE}</p>",
            _numbers(timeline, memory, whole_bytes, unit),
            f'<div class="scroll">{"".join(_Picture(timeline, memory, whole_bytes, unit).parts())}</div>',
            _legend(timeline),
            _table(timeline, memory, whole_bytes),
            "</html>\n",
        )
    )


def colour(op: Op, chunks: int) -> str:
    """CSS colour of a compute operation."""
    if op.kind not in LAYERED:
        return "hsl(215 12% 62%)"
    hue = HUES[op.microbatch % len(HUES)]
    depth = op.chunk / max(chunks - 1, 1)
    light = {Kind.FORWARD: 84 - 16 * depth, Kind.WEIGHT_BACKWARD: 60 - 10 * depth}.get(op.kind, 48 - 16 * depth)
    return f"hsl({hue} {35 if op.kind is Kind.WEIGHT_BACKWARD else 62}% {light:.0f}%)"


@dataclass(frozen=True)
class _Scale:
    """From seconds to pixels."""

    per_second: float

    def x(self, time: float) -> float:
        return LEFT + time * self.per_second


class _Picture:
    def __init__(self, timeline: Timeline, memory: Memory, whole_bytes: float, unit: "Unit") -> None:
        self.timeline, self.memory, self.whole, self.unit = timeline, memory, whole_bytes, unit
        longest = max(len(events) for events in timeline.events)
        self.width = min(max(1100.0, 15.0 * longest), 14000.0)
        self.scale = _Scale((self.width - LEFT - RIGHT) / (timeline.makespan or 1.0))
        self.tips = _Tips(timeline, unit)

    def parts(self) -> Iterator[str]:
        ranks = range(len(self.timeline.events))
        height = TOP + len(ranks) * (LANE + CURVE + GAP)
        size = f'width="{self.width:.0f}" height="{height:.0f}" viewBox="0 0 {self.width:.0f} {height:.0f}"'
        yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="Timeline of all ranks">'
        yield from self._axis(height)
        for rank in ranks:
            yield from self._rank(rank, TOP + rank * (LANE + CURVE + GAP))
        yield "</svg>"

    def _axis(self, height: float) -> Iterator[str]:
        step = nice_step(self.timeline.makespan, self.width / 110)
        for tick in range(int(self.timeline.makespan / step) + 1):
            x = self.scale.x(tick * step)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8:.0f}" y2="{height:.0f}"/>'
            yield f'<text class="soft" x="{x + 3:.1f}" y="{TOP - 12:.0f}">{self.unit.of(tick * step)}</text>'

    def _rank(self, rank: int, y: float) -> Iterator[str]:
        span = self.scale.x(self.timeline.makespan) - LEFT
        yield f'<text x="10" y="{y + LANE / 2 + 4:.1f}">rank {rank}</text>'
        yield f'<rect class="idle" x="{LEFT}" y="{y:.1f}" width="{span:.1f}" height="{LANE}"/>'
        for event in self.timeline.events[rank]:
            if event.end == event.start:
                continue
            yield from self._operation(rank, event, y)
        yield from self._curve(rank, y + LANE + 3)

    def _operation(self, rank: int, event: Event, y: float) -> Iterator[str]:
        op, x = event.op, self.scale.x(event.start)
        width = max(self.scale.x(event.end) - x, 0.5)
        fill, tip = colour(op, self.timeline.schedule.shape.chunks), escape(self.tips.of(rank, event))
        yield f'<rect class="op" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{LANE}" fill="{fill}">'
        yield f"<title>{tip}</title></rect>"
        dark = "" if op.kind is Kind.FORWARD else " dark"
        share = self.tips.share(rank, op)
        if share and width > 4:
            # Upwards for what is given away, downwards for what is taken on.
            tip_y, base = (y + 2, y + 7) if share > 0 else (y + LANE - 2, y + LANE - 7)
            middle = x + width / 2
            yield f'<path class="shared{dark}" d="M{middle:.1f} {tip_y}l-3 {base - tip_y}h6z"/>'
        if width >= NARROWEST_NUMBER:
            place = f'x="{x + width / 2:.1f}" y="{y + LANE / 2:.1f}"'
            yield f'<text class="number{dark}" {place}>{op.slice}</text>'

    def _curve(self, rank: int, y: float) -> Iterator[str]:
        points, worst = self.memory.curves[rank], self.memory.worst or 1.0
        bottom = y + CURVE - 4
        path = [f"M{LEFT} {bottom:.1f}"]
        for point, following in pairwise((*points, points[-1])):
            level = bottom - (CURVE - 6) * point.total / worst
            path.append(f"V{level:.1f}H{self.scale.x(following.time):.1f}")
        peak = self.memory.peak(rank).total / self.whole
        yield f'<path class="hold" d="{"".join(path)}V{bottom:.1f}z"><title>rank {rank}: at most {peak:.3f} of a '
        yield "microbatch through all layers</title></path>"
        yield f'<text class="soft" x="10" y="{bottom - 4:.1f}">peak {peak:.3f}</text>'


class _Tips:
    """What a reader is told of an operation."""

    def __init__(self, timeline: Timeline, unit: "Unit") -> None:
        self.shape, self.unit = timeline.schedule.shape, unit
        self.came: dict[tuple[int, Payload, int, tuple[int, int, int]], Transfer] = {}
        for transfer in timeline.transfers:
            op = transfer.op
            assert op.payload is not None
            self.came[transfer.target, op.payload, transfer.source, _place(op)] = transfer
        self.shared = {
            (rank, op.kind is Kind.EXCHANGE_FORWARD, _place(op)): op
            for rank, ops in enumerate(timeline.schedule.ranks)
            for op in ops
            if op.kind in EXCHANGES
        }

    def of(self, rank: int, event: Event) -> str:
        lines = [
            f"rank {rank}: {event.op}",
            f"{self._span(event.start, event.end)}, {self.unit.of(event.worked)} of work",
        ]
        if event.waited > 0:
            lines.append(f"waited {self.unit.of(event.waited)}")
        lines += [self._message(transfer) for transfer in self._messages(rank, event.op)]
        exchange = self._exchange(rank, event.op)
        if exchange is not None and exchange.partner is not None:
            verb = "gives" if exchange.share > 0 else "takes over"
            of = Op(event.op.kind, *exchange.partner)
            lines.append(f"{verb} attention over {abs(exchange.share)} slices; peer: rank {exchange.peer}, {of}")
        return "\n".join(lines)

    def share(self, rank: int, op: Op) -> int:
        exchange = self._exchange(rank, op)
        return exchange.share if exchange else 0

    def _exchange(self, rank: int, op: Op) -> Op | None:
        if op.kind not in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD):
            return None
        return self.shared.get((rank, op.kind is Kind.FORWARD, _place(op)))

    def _messages(self, rank: int, op: Op) -> list[Transfer]:
        keys = [
            (rank, need.payload, need.rank, _place(need.op)) for need in needs(self.shape, rank, op) if need.payload
        ]
        return [self.came[key] for key in keys if key in self.came]

    def _message(self, transfer: Transfer) -> str:
        assert transfer.op.payload is not None
        name = transfer.op.payload.name.lower().replace("_", " ")
        return f"{name} from rank {transfer.source}, under way {self._span(transfer.start, transfer.end)}"

    def _span(self, start: float, end: float) -> str:
        return f"{self.unit.of(start)} to {self.unit.of(end)}"


def _place(op: Op) -> tuple[int, int, int]:
    return op.microbatch, op.chunk, op.slice


class Unit(NamedTuple):
    """How times are spelt.

    Attributes:
        name: empty for plain numbers.
        per_second: how many a second has.
    """

    name: str
    per_second: float

    def of(self, seconds: float) -> str:
        """Spells ``seconds``."""
        return f"{seconds * self.per_second:.4g} {self.name}".rstrip()


PLAIN = Unit("", 1.0)


def time_unit(seconds: float) -> Unit:
    """The unit in which times of about ``seconds`` read well."""
    units = (Unit("s", 1.0), Unit("ms", 1e3))
    return next((unit for unit in units if seconds * unit.per_second >= 1), Unit("µs", 1e6))


def nice_step(span: float, ticks: float) -> float:
    """1, 2 or 5 times a power of ten, for at most ``ticks`` steps in ``span``."""
    if span <= 0:
        return 1.0
    wanted = span / max(ticks, 1.0)
    power = 10.0 ** (len(f"{int(wanted)}") - 1) if wanted >= 1 else 1.0
    while power > wanted:
        power /= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted)


def describe(shape: Shape) -> str:
    """One line: policy and numbers.

    >>> describe(Shape(4, 1, 2, 8))
    'slimpipe: 4 stages, 8 slices, 2 microbatches'
    """
    cut = [
        (shape.stages, "stage"),
        (shape.chunks, "chunk"),
        (shape.slices, "slice"),
        (shape.microbatches, "microbatch"),
    ]
    named = [_count(number, name) for number, name in cut if number > 1 or name in ("stage", "microbatch")]
    return f"{shape.policy}: {', '.join(named)}"


def _count(number: int, name: str) -> str:
    plural = {"microbatch": "microbatches"}.get(name, f"{name}s")
    return f"{number} {name if number == 1 else plural}"


def _numbers(timeline: Timeline, memory: Memory, whole: float, unit: Unit) -> str:
    peaks = [memory.peak(rank).total / whole for rank in range(len(memory.curves))]
    cells = [
        (f"{timeline.bubble:.1%}", "bubble, of ideal time"),
        (unit.of(timeline.makespan), "the step"),
        (unit.of(timeline.ideal), "ideal"),
        (f"{max(peaks):.3f}", "of one microbatch's activations at most on a rank"),
        (", ".join(map(str, timeline.peak_slices)), "slices held at most, by rank"),
    ]
    return (
        f'<div class="numbers">{"".join(f"<div><b>{big}</b><span>{small}</span></div>" for big, small in cells)}</div>'
    )


def _legend(timeline: Timeline) -> str:
    shape = timeline.schedule.shape
    used = {event.op.kind for events in timeline.events for event in events if event.end > event.start}
    items = [
        (f"microbatch {k}", colour(Op(Kind.BACKWARD, k, 0, 0), 1)) for k in range(min(shape.microbatches, len(HUES)))
    ]
    items += [
        (f"{name}{f' of chunk {chunk}' if shape.chunks > 1 else ''}", colour(Op(kind, 0, chunk, 0), shape.chunks))
        for kind, name in _names(used)
        for chunk in range(shape.chunks)
    ]
    boxes = "".join(f'<span><i style="background:{fill}"></i>{name}</span>' for name, fill in items)
    small = '<span><i style="background:hsl(215 12% 62%)"></i>embedding, output layer</span>' if used - LAYERED else ""
    signs = "<span>▲ gives attention away</span><span>▼ takes attention over</span>"
    shared = any(op.kind in EXCHANGES for ops in timeline.schedule.ranks for op in ops)
    return f'<div class="legend">{boxes}{small}{signs if shared else ""}</div>'


def _names(used: set[Kind]) -> Sequence[tuple[Kind, str]]:
    names = (
        (Kind.FORWARD, "forward"),
        (Kind.BACKWARD, "backward"),
        (Kind.WEIGHT_BACKWARD, "gradient of weights"),
    )
    return [(kind, name) for kind, name in names if kind in used]


def _table(timeline: Timeline, memory: Memory, whole: float) -> str:
    rows = "".join(
        f"<tr><td>{rank}</td><td>{timeline.bubbles[rank]:.1%}</td><td>{timeline.peak_slices[rank]}</td>"
        f"<td>{memory.peak(rank).total / whole:.3f}</td><td>{len(timeline.events[rank])}</td></tr>"
        for rank in range(len(timeline.events))
    )
    head = "<tr><th>rank</th><th>bubble</th><th>peak slices</th><th>peak share</th><th>operations</th></tr>"
    return f"<table>{head}{rows}</table>"
