"""``python -m thresher.pipeline``: draws what a pipeline schedule does and prints its numbers."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from thresher.errors import ConfigError, ThresherError
from thresher.pipeline.schedule.dump import to_csv
from thresher.pipeline.schedule.ops import Shape
from thresher.pipeline.simulate.link import Link
from thresher.pipeline.simulate.memory import Memory
from thresher.pipeline.simulate.perfetto import trace
from thresher.pipeline.simulate.picture import describe, html
from thresher.pipeline.simulate.report import Study, numbers
from thresher.pipeline.simulate.timeline import Timeline

USER_ERROR = 2
MOST_COST = 1e9
MOST_SLICES = 1_000_000
"""Over all stages, chunks and microbatches: minutes of simulation."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point; errors of the user are one message."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit code.

    Args:
        arguments: as typed after ``python -m thresher.pipeline``.
    """
    try:
        app(arguments, prog_name="python -m thresher.pipeline")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except ThresherError as error:
        return _tell(error.message)
    except OSError as error:
        return _tell(f"{type(error).__name__}: {error.filename}: {error.strerror}. Check the path and its permissions")
    return 0


def _tell(message: str) -> int:
    text = Text(message)
    text.highlight_regex(r"^[A-Z]\w*Error:", "bold red")
    Console(stderr=True).print(text, soft_wrap=True)
    return USER_ERROR


@app.command()
def pipeline(
    context: typer.Context,
    stages: Annotated[int, typer.Option(help="Ranks of the pipeline, p.")] = 4,
    chunks: Annotated[int, typer.Option(help="Chunks of layers per rank, v.")] = 1,
    slices: Annotated[int, typer.Option(help="Slices of each microbatch, n.")] = 8,
    microbatches: Annotated[int, typer.Option(help="Microbatches of a step, m.")] = 4,
    policy: Annotated[str, typer.Option(help="slimpipe, gpipe, 1f1b, interleaved, terapipe or seq1f1b.")] = "slimpipe",
    slack: Annotated[int, typer.Option(help="Forwards in flight per hop: 1 holds less, 2 hides transfers.")] = 2,
    exchange: Annotated[
        int | None, typer.Option(metavar="LIMIT", help="Share attention between ranks, at most so many slices; 0: any.")
    ] = None,
    attention_ratio: Annotated[float, typer.Option(help="Mean cost of attention over that of all else.")] = 0.0,
    latency: Annotated[float, typer.Option(help="Of a message, in forwards of a slice through a chunk.")] = 0.0,
    head: Annotated[float, typer.Option(help="Cost of the output layer over that of a chunk's forward.")] = 0.0,
    split_embedding: Annotated[bool, typer.Option("--split-embedding", help="Cut it over the ranks.")] = False,
    split_head: Annotated[bool, typer.Option("--split-head", help="Cut the output layer over the ranks.")] = False,
    split_backward: Annotated[bool, typer.Option("--split-backward", help="Weights later, in the drain.")] = False,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a picture.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
    trace_file: Annotated[Path | None, typer.Option("--trace", help="Write a trace for ui.perfetto.dev.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the schedule.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show every policy on the same work.")] = False,
    cluster: Annotated[str | None, typer.Option(help="Predict a run on a cluster: h100-128, h100-256.")] = None,
) -> None:
    """Simulate a pipeline schedule: bubbles, memory, a picture.

    One forward of one slice through one chunk takes 1, its backward 2; attention and the output layer come on top.

    `python -m thresher.pipeline --stages 4 --chunks 2 --slices 8 --microbatches 4 --html out.html`

    `python -m thresher.pipeline --slices 16 --attention-ratio 3 --exchange 0 --compare`
    """
    if cluster is not None:
        _require_alone(context)
        _show_cluster(cluster)
        return
    for name, value in (("attention-ratio", attention_ratio), ("latency", latency), ("head", head)):
        if not 0 <= value <= MOST_COST:
            raise ConfigError(f"{value} is no cost", where=f"--{name}", fix=f"give a number from 0 to {MOST_COST:g}")
    if (passes := stages * chunks * microbatches * slices) > MOST_SLICES:
        raise ConfigError(
            f"{passes:,} passes of slices through stages are too many",
            where="--stages x --chunks x --microbatches x --slices",
            fix=f"give at most {MOST_SLICES:,}",
        )
    shape = Shape(stages, chunks, microbatches, slices, slack, policy, split_embedding, split_head, split_backward)
    study = Study(shape, attention_ratio, head=head)
    if exchange is not None:
        study = replace(study, exchange=study.rule(exchange, latency))
    wire = Link(latency_s=latency)
    timeline, memory = study.run(wire)
    if timeline.schedule.shape != shape:
        print(f"{policy} does the same work as {describe(timeline.schedule.shape).partition(': ')[2]}")
    _show(timeline, memory, study.whole_bytes)
    if compare:
        _show_comparison(study, wire)
    title = describe(timeline.schedule.shape)
    for file, text in (
        (html_file, lambda: html(timeline, memory, study.whole_bytes, title, in_seconds=False)),
        (json_file, lambda: json.dumps(numbers(timeline, memory, study.whole_bytes), indent=1)),
        (trace_file, lambda: json.dumps(trace(timeline, memory))),
        (csv_file, lambda: to_csv(timeline.schedule)),
    ):
        _write(file, text)


def _write(file: Path | None, text: Callable[[], str]) -> None:
    if file is not None:
        file.write_text(text(), encoding="utf-8")
        print(f"wrote {file}")


def _show(timeline: Timeline, memory: Memory, whole: float) -> None:
    table = Table(title=describe(timeline.schedule.shape), title_justify="left")
    for name in ("rank", "bubble", "peak slices", "peak share of a microbatch", "operations", "messages sent"):
        table.add_column(name, justify="right")
    for rank, events in enumerate(timeline.events):
        sent = sum(transfer.source == rank for transfer in timeline.transfers)
        share = memory.peak(rank).total / whole
        cells = (rank, f"{timeline.bubbles[rank]:.2%}", timeline.peak_slices[rank], f"{share:.3f}", len(events), sent)
        table.add_row(*map(str, cells))
    Console().print(table)
    print(f"bubble {timeline.bubble:.2%} of ideal time: {timeline.makespan:.6g} instead of {timeline.ideal:.6g}")


def _show_comparison(study: Study, wire: Link) -> None:
    table = Table(title="The same work by every policy", title_justify="left")
    for name in ("policy", "bubble", "time", "peak share of a microbatch"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    reasons = []
    for name, outcome, share in study.compare(wire):
        if isinstance(outcome, str):
            table.add_row(name, "-", "-", "-")
            reasons.append(f"{name}: {outcome}")
        else:
            table.add_row(name, f"{outcome.bubble:.2%}", f"{outcome.makespan:.6g}", f"{share:.3f}")
    Console().print(table)
    for reason in reasons:
        print(reason)


def _require_alone(context: typer.Context) -> None:
    for parameter in context.command.params:
        name = parameter.name or ""
        if name != "cluster" and context.params.get(name, parameter.default) != parameter.default:
            raise ConfigError(
                f"forecasts have settings of their own, and {parameter.opts[0]} would do nothing",
                where="--cluster",
                fix=f"leave {parameter.opts[0]} out",
            )


def _show_cluster(name: str) -> None:
    from thresher.pipeline.simulate.forecast import report

    print(report(name))


if __name__ == "__main__":
    main()
