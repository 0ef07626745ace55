"""Which numbers of heads go together."""

from torch import Tensor

from thresher.errors import ConfigError


def require_groups(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises unless the heads of keys and values divide those of queries [B, H, T, E].

    Raises:
        ConfigError: says what has how many.
    """
    heads, keys, values = (x.shape[1] for x in (query, key, value))
    if keys != values or heads % keys:
        raise ConfigError(
            f"{heads} heads of queries with {keys} of keys and {values} of values",
            fix="choose as many heads of values as of keys, and a number that divides the heads of queries",
        )
