"""How many bytes a user allows the tables."""

import re

from thresher.errors import ConfigError

WHERE = "tiers.budget"
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|[kmgt]i?b|b)", re.IGNORECASE)
_UNITS = ("B", "kB", "MB", "GB", "TB")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def budget_bytes(text: str, fp32_bytes: int) -> int:
    """Bytes that ``text`` allows: a share of ``fp32_bytes`` (``40%``), or bytes (``2GB``, ``512 MB``, ``1.5GiB``).

    Raises:
        ConfigError: it is neither, or zero.
    """
    found = _BUDGET.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"'{text}' is no budget", where=WHERE, fix=_fix(text))
    number, unit = float(found["number"]), found["unit"].lower()
    if number == 0:
        raise ConfigError(
            f"'{text}' allows no byte at all", where=WHERE, fix="leave it empty for no budget, or give more"
        )
    if unit == "%":
        return int(number / 100.0 * fp32_bytes)
    base = 1024 if "i" in unit else 1000
    return int(number * base ** _POWERS[unit.rstrip("b").rstrip("i")])


def _fix(text: str) -> str:
    """A bare number may be meant as a share or as bytes: say how to write either."""
    try:
        number = float(text)
    except ValueError:
        return "write a share of the fp32 size such as 40%, or bytes such as 2GB or 512MB"
    share = number * 100 if 0 < number <= 1 else 40
    return f"write {share:g}% for a share of the fp32 size, or a number with B, KB, MB, GB or TB for bytes"


def readable(size_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point: ``1.5 kB``."""
    value, unit = float(size_bytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
