"""Numbers as people read them."""

import math
from datetime import UTC, datetime, timedelta

ABSENT = "-"


def metric(value: float) -> str:
    """Four decimals; a dash where it is undefined.

    >>> metric(0.76543), metric(float("nan"))
    ('0.7654', '-')
    """
    return ABSENT if math.isnan(value) else f"{value:.4f}"


def count(value: float) -> str:
    """At most four digits and a unit.

    >>> count(950), count(68509), count(1_469_307)
    ('950', '68.5 k', '1.47 M')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 10 or (value >= size and unit != "k"):
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes with a binary unit.

    >>> size(512), size(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    for unit, exponent in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << exponent:
            return f"{value / (1 << exponent):.1f} {unit}"
    return f"{value:.0f} B"


def share(value: float) -> str:
    """Percent.

    >>> share(0.1234), share(0.00004), share(0.0)
    ('12 %', '<0.1 %', '0 %')
    """
    if math.isnan(value):
        return ABSENT
    if 0 < value < 0.001:
        return "<0.1 %"
    return f"{100 * value:.2g} %" if value < 0.995 else "100 %"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(4.21), duration(372), duration(90061)
    ('4.2 s', '6 min 12 s', '25 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = timedelta(seconds=round(seconds)) // timedelta(seconds=1)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(unix: float) -> str:
    """A time in UTC, to the minute."""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")
