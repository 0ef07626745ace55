"""The recipes there are, and how one is built from a name and options."""

from typing import Any

from thresher.data.recipes.avazu import Avazu
from thresher.data.recipes.base import Recipe
from thresher.data.recipes.completejourney import CompleteJourney
from thresher.data.recipes.criteo import Criteo
from thresher.data.recipes.kuairand import KuaiRand
from thresher.data.recipes.libsvm import LibSvm
from thresher.data.recipes.ml_100k import MovieLens100k
from thresher.data.recipes.movielens import MovieLens
from thresher.data.recipes.recbole import RecBole
from thresher.data.recipes.synthetic import Synthetic
from thresher.data.recipes.taobao_ad import TaobaoAd
from thresher.data.recipes.text import Text
from thresher.data.recipes.user_item import UserItem
from thresher.errors import ConfigError, nearest
from thresher.settings import parse

_RECIPES: tuple[type[Recipe], ...] = (
    CompleteJourney,
    MovieLens100k,
    Synthetic,
    Avazu,
    Criteo,
    KuaiRand,
    LibSvm,
    MovieLens,
    RecBole,
    TaobaoAd,
    Text,
    UserItem,
)


def recipes() -> dict[str, type[Recipe]]:
    """Every recipe by the name users type."""
    return {kind.recipe: kind for kind in _RECIPES}


def build_recipe(name: str, options: dict[str, Any], source: str = "options") -> Recipe:
    """The recipe ``name`` with ``options``.

    Args:
        source: where name and options come from; starts every message.

    Raises:
        ConfigError: no such recipe, an unknown option, or a value out of range.
    """
    known = recipes()
    if name not in known:
        raise ConfigError(f"no recipe '{name}'", where=source, fix=nearest(name, known))
    return parse(known[name], options, f"{source} of recipe '{name}'")
