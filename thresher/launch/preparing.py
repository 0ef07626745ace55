"""Prepares data sets for the command line: with progress, and only where there is something to prepare."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from thresher.data.dataset import Dataset
from thresher.data.prepare import Progress, Report, prepare
from thresher.data.recipes.base import Recipe
from thresher.data.recipes.registry import build_recipe
from thresher.errors import ConfigError

SAY_EVERY_S = 10.0
"""Seconds between lines where the terminal cannot show a moving one."""


def dataset_for(path: Path, name: str, options: dict[str, Any], source: str) -> Dataset:
    """The data set of a run, prepared first if it is absent and the configuration says how.

    Args:
        path: ``data.path`` of the configuration.
        name: ``data.recipe``; empty where ``path`` has to be there.
        options: ``data.options``.
        source: what messages call the configuration.

    Raises:
        ConfigError: ``path`` holds a data set made otherwise than the configuration says.
        DataError: there is no data set and no recipe, a source is missing, or a file is damaged.
    """
    if not name:
        return Dataset.open(path)
    recipe = build_recipe(name, options, f"{source}: data.options")
    if not path.exists():
        return prepare_shown(recipe, path, overwrite=False)
    dataset = Dataset.open(path)
    difference = _difference(dataset, name, recipe.model_dump(mode="json"))
    if difference:
        raise ConfigError(
            difference,
            where=f"{source}: data.path {path}",
            fix="give another data.path, or remove the folder to have it made again",
        )
    return dataset


def _difference(dataset: Dataset, recipe: str, options: dict[str, Any]) -> str:
    """How the data set differs from the one asked for; empty if it does not."""
    made = dataset.manifest
    if made.recipe != recipe:
        return f"holds a data set of recipe '{made.recipe}', not '{recipe}'"
    for key in sorted(made.options | options):
        if made.options.get(key) != options.get(key):
            return f"holds a data set with option {key}={made.options.get(key)!r}, not {options.get(key)!r}"
    return ""


def prepare_shown(recipe: Recipe, out: Path, overwrite: bool, max_bad_share: float = 0.001) -> Dataset:
    """Prepares a data set and shows how far it is.

    Raises:
        ThresherError: as :func:`thresher.data.prepare.prepare`.
    """
    with _shown(f"Preparing {out} with recipe '{recipe.recipe}'") as report:
        return prepare(recipe, out, overwrite=overwrite, max_bad_share=max_bad_share, progress=report)


@contextmanager
def _shown(title: str) -> Iterator[Report]:
    if sys.stderr.isatty():
        with Console(stderr=True).status(title) as status:
            yield lambda progress: status.update(f"{title}: {_text(progress)}")
        return
    print(title, file=sys.stderr)
    said = [0.0]

    def say(progress: Progress) -> None:
        if progress.seconds - said[0] >= SAY_EVERY_S:
            said[0] = progress.seconds
            print(f"  {_text(progress)}", file=sys.stderr)

    yield say


def _text(progress: Progress) -> str:
    return f"{progress.phase}, {progress.rows:,} rows, {progress.seconds:.0f} s"
