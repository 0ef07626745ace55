"""``thresher data``: prepare data sets and look at them."""

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(no_args_is_help=True, help="Prepare data sets and look at them.")

Options = Annotated[list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="Values are YAML.")]


@data.command()
def prepare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="See `thresher data recipes`.")],
    options: Options = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")] = Path(),
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="OPTION=VALUE, again and again.")] = None,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="Share of bad rows that is tolerated.")] = 0.001,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another data set in that folder.")] = False,
) -> None:
    """Convert files as users have them to a data set.

    Examples:

    `thresher data prepare synthetic --out data/synthetic rows=100000`

    `thresher data prepare criteo --out data/criteo --option source=train.txt`
    """
    from thresher.launch.data_views import prepare_from

    prepare_from(recipe, [*(options or ()), *(option or ())], out, max_bad_share, overwrite)


@data.command()
def recipes(
    name: Annotated[str, typer.Argument(metavar="[RECIPE]", help="Show the options of this one.")] = "",
) -> None:
    """List the recipes, or the options of one.

    Example: `thresher data recipes criteo`
    """
    from thresher.launch.data_views import list_recipes

    list_recipes(name)


@data.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared data set.")],
    rows: Annotated[int, typer.Option(min=0, help="First rows of the training split to print.")] = 3,
) -> None:
    """Show schema, splits, facts and first rows of a data set.

    Example: `thresher data show data/criteo --rows 5`
    """
    from thresher.launch.data_views import show_dataset

    show_dataset(folder, rows)
