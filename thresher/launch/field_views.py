"""What ``thresher fields`` shows of a run."""

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from thresher.trainer.report.fields import field_summary, field_table
from thresher.trainer.report.run import Run
from thresher.trainer.smaller import useless_fields, write_smaller


def show_fields(folder: Path, out: Path | None) -> None:
    """Prints the newest scores of a run's fields; writes a configuration without the useless ones if asked to.

    Raises:
        ConfigError: the run scored no fields, or the file cannot be written.
    """
    run = Run.read(folder)
    useless, grid = useless_fields(run), field_table(run)
    assert grid is not None
    table = Table(title=field_summary(run), title_justify="left")
    for number, head in enumerate(grid.head):
        table.add_column(head, justify="right" if number else "left")
    for row in grid.rows:
        table.add_row(*row)
    Console().print(table)
    typer.echo(f"useless: {', '.join(useless.names) or 'none'}")
    if out is not None:
        write_smaller(run, useless.names, out)
        typer.echo(f"wrote {out}: the same run without them")
