"""The command ``thresher``. Commands import what they need when they run, so that help comes at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from thresher import __version__
from thresher.launch.data_commands import data
from thresher.launch.logs import open_command_logs
from thresher.launch.messages import tell
from thresher.versions import check_installed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Trains recommendation models with sharded embedding tables.",
    epilog="Start with `thresher doctor`, then `thresher train examples/completejourney.yaml`.",
)
app.add_typer(data, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Values are YAML.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see examples/.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder a training run has left.")]


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command; returns its exit code (see ``messages``).

    Args:
        arguments: as typed after ``thresher``; ``--debug`` may stand anywhere.
    """
    debug = "--debug" in arguments
    kept = [argument for argument in arguments if argument != "--debug"]
    open_command_logs()
    try:
        if kept and kept[0] not in ("doctor", "--version") and not {"-h", "--help"} & set(kept):
            check_installed()
        app(kept, prog_name="thresher")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        return tell(error, debug)
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"thresher {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand after any command.")] = False,
) -> None:
    """Options of all commands; ``run`` has taken ``--debug`` out already."""


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a model: starts `launch.processes` processes here.

    With the run directory of an earlier run it goes on where that one ended.

    Examples:

    `thresher train examples/completejourney.yaml`

    `thresher train my.yaml launch.processes=4 train.batch_size=8192 optim.dense.lr=3e-4`
    """
    from thresher.launch.local import train_here

    train_here(config, tuple(overrides or ()))


@app.command(name="eval")
def evaluate(
    run_dir: RunDir,
    split: Annotated[str, typer.Option(help="The split to measure; empty for the run's `data.test`.")] = "",
    checkpoint: Annotated[int, typer.Option(min=-1, help="Step of a checkpoint; -1 for the best or newest.")] = -1,
    processes: Annotated[int, typer.Option(min=0, help="Processes; 0 for as many as the run had.")] = 0,
) -> None:
    """Measure a trained model on held-out rows.

    Example: `thresher eval runs/completejourney --split test --checkpoint 1200`
    """
    from thresher.launch.local import evaluate_here

    evaluate_here(run_dir, split, checkpoint, processes)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show which process would hold which part of each table, and what a run would be, without training.

    Example: `thresher plan my.yaml launch.processes=8 sharding.default=row_wise`
    """
    from thresher.launch.dry_run import show_plan

    show_plan(config, tuple(overrides or ()))


@app.command()
def report(run_dir: RunDir) -> None:
    """Write `report.html` of a run again.

    Example: `thresher report runs/completejourney`
    """
    from thresher.launch.local import report_here

    report_here(run_dir)


@app.command()
def fields(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option("--out", help="Write a configuration without the useless ones.")] = None,
) -> None:
    """Show how much each field matters in a run that scored them (`fields.score_every`)."""
    from thresher.launch.field_views import show_fields

    show_fields(run_dir, out)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, memory, disk, and whether processes can talk to each other."""
    from thresher.launch.doctor import diagnose

    raise typer.Exit(diagnose())


if __name__ == "__main__":
    main()
