"""Puts the page together."""

from dataclasses import asdict
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from thresher.trainer.report import charts, pictures, tables, units
from thresher.trainer.report.fields import field_chart, field_events, field_summary, field_table
from thresher.trainer.report.files import write_atomically
from thresher.trainer.report.run import Run

REPORT = "report.html"


def build_report(folder: Path) -> Path:
    """Writes ``report.html`` from the files of the run directory ``folder``, at any time during a run or after it.

    The page needs no network: styles, scripts and Plotly stand in it, and its security policy forbids all requests.

    Returns:
        The path of the page, which is replaced as a whole.

    Raises:
        DataError, ConfigError: a file of the run directory is missing or broken; names it.
        OSError: the page cannot be written.
    """
    path = folder / REPORT
    write_atomically(path, render(Run.read(folder)))
    return path


def render(run: Run) -> str:
    """The page as HTML."""
    loader = PackageLoader("thresher.trainer.report", "page")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": units.share, "duration": units.duration, "moment": units.moment}
    page = resources.files("thresher.trainer.report") / "page"
    found, scored = charts.charts(run), field_chart(run)
    return environment.get_template("page.html").render(
        run=run,
        end=run.of("end")[-1] if run.status != "in progress" else None,
        newest=run.records[-1]["time"] if run.records else None,
        tiles=tables.tiles(run),
        charts=found,
        figures={chart.key: asdict(chart) for chart in (*found, scored) if chart is not None},
        scored=scored,
        scores=field_table(run),
        field_events=field_events(run),
        field_summary=field_summary(run),
        metrics=tables.metrics_table(run),
        fields=tables.fields(run),
        data=tables.data_table(run),
        plan=tables.plan_table(run),
        bars=pictures.bars(run),
        hidden_bars=max(0, run.plan.world - pictures.MAX_BARS),
        colours=pictures.table_colours(run),
        other=pictures.OTHER if len(run.plan.tables) > pictures.NAMED_TABLES else "",
        balance=pictures.balance(run.plan),
        pictures=pictures.pictures(run),
        copied=pictures.copied(run),
        width=pictures.WIDTH,
        height=pictures.HEIGHT,
        style=(page / "page.css").read_text(encoding="utf-8"),
        script=(page / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )
