"""The curves of a run as Plotly figures in plain JSON; colours of text and grid are set by the page (light or dark)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from thresher.trainer.report.files import Record
from thresher.trainer.report.run import Run

MAX_POINTS = 2000
"""Points a curve is thinned to: more cannot be told apart."""
SMOOTHED_SHARE = 0.06
"""Share of a curve's points that its running mean looks at."""
LOG = {"type": "log", "dtick": "D2", "exponentformat": "e"}
COLOURS = ("#2f7ed8", "#f28e2b", "#17a398", "#d1495b", "#8367c7", "#8a9a5b")


@dataclass(frozen=True)
class Chart:
    """One figure; ``data`` and ``layout`` as Plotly's JavaScript takes them."""

    key: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def charts(run: Run) -> list[Chart]:
    """All curves that have points."""
    train, valid = _thinned(run.of("train")), run.evals(run.valid)
    names = {metric for record in valid for metric in record["metrics"]}
    quality = [
        _chart(
            "loss",
            "Loss",
            _noisy("train", train, "loss") + _evaluated("valid logloss", valid, "logloss", 1),
        ),
        _chart("auc", "AUC", _noisy("train", train, "auc") + _evaluated("valid", valid, "auc", 1) + _gauc(valid)),
    ]
    ranks = sorted(name for name in names if "@" in name or name == "mrr")
    others = sorted(names - {"auc", "gauc", "logloss", "ne", "calibration", *ranks})
    quality += [_chart("ranking", "Ranking metrics, validation", _all(valid, ranks))]
    quality += [_chart("others", "Further metrics, validation", _all(valid, others))]
    quality += [_chart("entropy", "Normalised entropy, validation", _evaluated("NE", valid, "ne", 1))]
    quality += [
        _chart("calibration", "Calibration, validation", _evaluated("predicted / observed", valid, "calibration", 1))
    ]
    speed = [
        _chart(
            "speed", "Samples per second, all ranks", _line("samples/s", train, "samples_per_s", 2), rangemode="tozero"
        ),
        _chart(
            "wait",
            "Share of time waiting for data",
            _line("data wait", train, "data_wait", 3),
            tickformat=".0%",
            rangemode="tozero",
        ),
        _chart(
            "rate",
            "Learning rate",
            _line("dense", train, "lr_dense", 4) + (_line("tables", train, "lr_tables", 5) if run.plan.tables else []),
            type="log",
        ),
        _chart("norm", "Norm of the dense gradient", _noisy("norm", train, "grad_norm"), **LOG),
    ]
    speed += _table_charts(_thinned(run.of("tables")))
    marks = [_mark(record["step"]) for record in run.of("start") if record["step"]]
    found = [chart for chart in quality + speed if chart.data]
    last_step = max((record["step"] for record in run.records), default=0)
    for chart in found:
        chart.layout.update(shapes=marks, xaxis={"range": [0, 1.015 * last_step]})
    return found


def _table_charts(records: list[Record]) -> list[Chart]:
    """Bytes against the budget, and how many rows are in which tier."""
    share = _trace("in use", records, lambda r: r["live_bytes"] / r["fp32_bytes"], 0, "lines")
    share += _trace("budget", records, lambda r: r["budget_bytes"] / r["fp32_bytes"], 3, "lines")
    tiers = list(records[-1]["rows"]) if records else []
    used = [tier for tier in tiers if any(record["rows"][tier] for record in records)]
    rows = [
        trace | {"stackgroup": "rows", "mode": "lines"}
        for place, tier in enumerate(used)
        for trace in _trace(tier, records, lambda r, tier=tier: r["rows"][tier], place, "lines")  # type: ignore[misc]
    ]
    return [
        _chart("bytes", "Embedding tables, share of their fp32 bytes", share, tickformat=".0%", rangemode="tozero"),
        _chart("tiers", "Rows by tier", rows, rangemode="tozero"),
    ]


def _chart(key: str, title: str, data: list[dict[str, Any]], **yaxis: str) -> Chart:
    legend = sum(trace.get("showlegend", True) for trace in data) > 1
    layout = {"yaxis": yaxis, "showlegend": legend, "margin": {"l": 48, "r": 14, "t": 26 if legend else 8, "b": 30}}
    return Chart(key, title, data, layout)


def _line(name: str, records: list[Record], key: str, colour: int, mode: str = "lines") -> list[dict[str, Any]]:
    return _trace(name, records, lambda r: r[key], colour, mode)


def _evaluated(name: str, records: list[Record], metric: str, colour: int) -> list[dict[str, Any]]:
    return _trace(name, records, lambda r: r["metrics"].get(metric, math.nan), colour, "lines+markers")


def _gauc(records: list[Record]) -> list[dict[str, Any]]:
    return _evaluated("valid GAUC", records, "gauc", 2)


def _all(records: list[Record], metrics: list[str]) -> list[dict[str, Any]]:
    return [trace for place, name in enumerate(metrics) for trace in _evaluated(name, records, name, place)]


def _noisy(name: str, records: list[Record], key: str) -> list[dict[str, Any]]:
    """The values, faint, and their running mean."""
    raw = _line(name, records, key, 0)
    if not raw:
        return []
    smooth = dict(raw[0], y=_smoothed(raw[0]["y"]), name=name)
    return [raw[0] | {"opacity": 0.28, "showlegend": False, "hoverinfo": "skip"}, smooth]


def _trace(
    name: str, records: list[Record], value: Callable[[Record], float], colour: int, mode: str
) -> list[dict[str, Any]]:
    points = [(r["step"], float(value(r))) for r in records]
    points = [(step, y) for step, y in points if math.isfinite(y)]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    # One point is no line.
    mode = "markers" if len(points) == 1 else mode
    line = {"color": COLOURS[colour % len(COLOURS)], "width": 2}
    return [
        {
            "x": list(steps),
            "y": list(values),
            "name": name,
            "mode": mode,
            "line": line,
            "marker": {"size": 6, "color": line["color"]},
        }
    ]


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each point and its neighbours on both sides, as many as there are on the shorter one: no lag."""
    reach = round(len(values) * SMOOTHED_SHARE / 2)
    sums = list(accumulate(values, initial=0.0))
    result = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        result.append((sums[place + near + 1] - sums[place - near]) / (2 * near + 1))
    return result


def _thinned(records: list[Record]) -> list[Record]:
    every = math.ceil(len(records) / MAX_POINTS)
    return records[::every] if every > 1 else records


def _mark(step: int) -> dict[str, Any]:
    """A dotted line where a process took over from one that ended."""
    line = {"dash": "dot", "width": 1, "color": "#8a8f98"}
    return {"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": line}
