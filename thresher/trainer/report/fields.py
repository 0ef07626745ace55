"""What a report shows of the fields: how much each matters, what it costs, and which were dropped."""

import math
from typing import Any

from thresher.trainer.report.charts import COLOURS, Chart
from thresher.trainer.report.files import Record
from thresher.trainer.report.run import Run
from thresher.trainer.report.tables import Grid
from thresher.trainer.report.units import ABSENT, share, size

DROPPED_COLOUR = "#9aa3ad"
MAX_BARS = 60
"""Fields in the picture, the most important ones; the table has all."""
BAR_PIXELS = 19


def field_chart(run: Run) -> Chart | None:
    """Scores as bars with twice their standard error, the most important on top; None before the first scores."""
    newest = _newest(run)
    ranked = _ranked(newest) if newest else []
    shown = [name for name in ranked if math.isfinite(newest["scores"][name])][:MAX_BARS] if newest else []
    if not newest or not shown:
        return None
    kept = [name for name in shown if name not in newest["dropped"]]
    gone = [name for name in shown if name in newest["dropped"]]
    data = [_bars("kept", kept, newest, COLOURS[0])] if kept else []
    data += [_bars("dropped", gone, newest, DROPPED_COLOUR)] if gone else []
    layout = {
        "height": 90 + BAR_PIXELS * len(shown),
        "barmode": "overlay",
        "hovermode": "closest",
        "showlegend": bool(gone),
        "margin": {"l": 8, "r": 14, "t": 26 if gone else 8, "b": 44},
        "xaxis": {"showgrid": True, "rangemode": "tozero", "title": {"text": "mean change of a sample's loss"}},
        "yaxis": {"categoryorder": "array", "categoryarray": shown[::-1], "nticks": len(shown), "showgrid": False},
    }
    return Chart("fields", "Score of each field", data, layout)


def field_table(run: Run) -> Grid | None:
    """Every field, the most important first; None before the first scores."""
    newest = _newest(run)
    if newest is None:
        return None
    total = max(newest["all_bytes"], 1)
    head = ["field", "score", "standard error", "table bytes", "share of all", "score per MiB", "dropped at step"]
    return Grid(head, [_row(name, newest, total) for name in _ranked(newest)])


def field_events(run: Run) -> list[Record]:
    """What was done with fields, in order; readings of scores left out."""
    return [record for record in run.of("fields") if record["event"] != "scores"]


def field_summary(run: Run) -> str:
    """How many fields are left, in what bytes."""
    newest = _newest(run)
    if newest is None:
        return ""
    left, fields = len(newest["scores"]) - len(newest["dropped"]), len(newest["scores"])
    return (
        f"{left} of {fields} fields are read; their tables take {size(newest['table_bytes'])} "
        f"of {size(newest['all_bytes'])}, optimizer state included"
    )


def _newest(run: Run) -> Record | None:
    found = run.of("fields")
    return found[-1] if found else None


def _ranked(record: Record) -> list[str]:
    scores: dict[str, float] = record["scores"]
    return sorted(scores, key=lambda name: -scores[name] if math.isfinite(scores[name]) else math.inf)


def _bars(name: str, fields: list[str], record: Record, colour: str) -> dict[str, Any]:
    errors = [record["errors"][field] for field in fields]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": [record["scores"][field] for field in fields],
        "y": fields,
        "marker": {"color": colour},
        "error_x": {"type": "data", "array": [2 * e if math.isfinite(e) else 0.0 for e in errors], "thickness": 1.2},
        "hovertemplate": "%{y}: %{x:.4g}<extra></extra>",
    }


def _row(name: str, record: Record, total: int) -> list[str]:
    score, taken = record["scores"][name], record["bytes"][name]
    per_mib = score / (taken / 2**20) if taken else math.nan
    step = record["dropped"].get(name)
    return [
        name,
        _figure(score),
        _figure(record["errors"][name]),
        size(taken),
        share(taken / total),
        _figure(per_mib),
        "" if step is None else f"{step:,}",
    ]


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ABSENT
