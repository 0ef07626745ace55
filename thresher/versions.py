"""Whether the installed libraries fit together; asked once when ``thresher`` is imported."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from thresher.errors import VersionError
from thresher.pins import PINS

TRIO = ("torch", "torchrec", "fbgemm-gpu")
"""Libraries that load only together: FBGEMM's binary is built for one minor version of torch."""


def installed(name: str) -> str:
    """The installed version of a distribution, without a build tag such as ``+cpu``; empty if it is absent."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""


def check_installed(lookup: Callable[[str], str] = installed) -> None:
    """Compares torch, torchrec and fbgemm with the pins.

    Raises:
        VersionError: one differs or is absent; the message names the three versions that fit together.
    """
    found = {name: lookup(name) for name in TRIO}
    wrong = [name for name in TRIO if found[name] != PINS[name]]
    if lookup("fbgemm-gpu-cpu") not in ("", PINS["fbgemm-gpu"]):
        wrong.append("fbgemm-gpu-cpu")
    if not wrong:
        return
    has = ", ".join(f"{name} {found[name] or 'absent'}" for name in TRIO)
    fit = ", ".join(f"{name} {PINS[name]}" for name in TRIO)
    raise VersionError(
        f"these libraries do not fit together: {has}",
        where="installed packages",
        fix=f"these fit together: {fit}; 'make setup' installs them",
    )
