"""Whether the installed libraries fit together; asked once when ``thresher`` is imported."""

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def versions() -> dict[str, str]:
    """Distribution name to installed version, of Thresher and the pinned libraries; empty where one is absent."""
    return {name: installed(name) for name in ("thresher", *PINS, "fbgemm-gpu-cpu")}


def is_command_line(argv: Sequence[str]) -> bool:
    """Whether this process is the ``thresher`` command or a rank of it, which check the versions by themselves.

    They print a misfit as a message instead of a traceback, and ``thresher doctor`` has to run in spite of one.

    Args:
        argv: ``sys.orig_argv``.
    """
    if "-m" in argv[:-1]:
        return argv[argv.index("-m") + 1].startswith("thresher.launch.")
    return len(argv) > 1 and Path(argv[1]).stem == "thresher"


def check_installed(lookup: Callable[[str], str] = installed) -> None:
    """Compares torch, torchrec and fbgemm with the pins.

    Raises:
        VersionError: one differs or is absent; the message names the three versions that fit together.
    """
    found = {name: lookup(name) for name in TRIO}
    cpu_build = lookup("fbgemm-gpu-cpu")
    if all(found[name] == PINS[name] for name in TRIO) and cpu_build in ("", PINS["fbgemm-gpu"]):
        return
    has = ", ".join(f"{name} {found[name] or 'absent'}" for name in TRIO)
    has += f" (its CPU build fbgemm-gpu-cpu {cpu_build})" if cpu_build else ""
    fit = ", ".join(f"{name} {PINS[name]}" for name in TRIO)
    raise VersionError(
        f"these libraries do not fit together: {has}",
        where="installed packages",
        fix=f"these fit together: {fit}; 'make setup' installs them",
    )
