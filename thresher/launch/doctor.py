"""``thresher doctor``: what works on this machine, and the cure for what does not. Runs also where torch does not."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from thresher.errors import VersionError
from thresher.pins import PINS
from thresher.versions import TRIO, check_installed, installed

LIMIT_S = 120
"""Seconds that one trial may take."""

FBGEMM_TRIAL = (
    "import torch, fbgemm_gpu; x = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 3])); "
    "assert x.tolist() == [0, 2, 5]; print('operators load')"
)
KERNELS_TRIAL = "from thresher.embeddings.kernels.native.library import status; print(status())"
DEVICE_TRIAL = (
    "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
    "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)) or f'cpu only (torch {torch.__version__})')"
)


@dataclass(frozen=True)
class Check:
    """One finding. ``fail`` means that training will not work, ``warn`` that something may not."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def diagnose() -> int:
    """Prints every check as it is made; returns 1 if one fails, else 0."""
    console, checks = Console(), []
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in all_checks():
        checks.append(check)
        line = Text(f"{check.state:<5} {check.name:<10} {check.found}", style=colours[check.state])
        console.print(line, soft_wrap=True)
        if check.fix:
            console.print(Text(f"{'':<16} {check.fix}"), soft_wrap=True)
    failed = [check.name for check in checks if check.state == "fail"]
    console.print(f"Does not work: {', '.join(failed)}" if failed else "Thresher works here")
    return 1 if failed else 0


def all_checks() -> Iterator[Check]:
    """Every check, cheap ones first; what needs torch is tried only where its versions fit."""
    yield check_python(sys.version_info[:3])
    fit = check_trio(installed)
    yield fit
    yield from check_pins(installed)
    yield check_machine()
    yield check_compiler(shutil.which)
    yield check_space("shm", Path("/dev/shm"), 64 << 20, "give the container more: docker run --shm-size 1g")
    yield check_space("disk", Path.cwd(), 2 << 30, "free some, or set run_dir and data.path elsewhere")
    if fit.state == "ok":
        yield tried("fbgemm", FBGEMM_TRIAL, "install again: 'make setup' in a fresh checkout")
        yield check_kernels()
        yield tried("device", DEVICE_TRIAL, "install again: 'make setup' in a fresh checkout")
        yield check_processes()


def check_python(version: tuple[int, ...]) -> Check:
    """Python itself."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "fail", found, "use Python 3.11 or newer")
    return Check("python", "ok", f"{found} at {sys.executable}")


def check_trio(lookup: Callable[[str], str]) -> Check:
    """The three libraries that load only together."""
    try:
        check_installed(lookup)
    except VersionError as error:
        return Check("versions", "fail", error.what, error.fix)
    return Check("versions", "ok", ", ".join(f"{name} {lookup(name)}" for name in TRIO))


def check_pins(lookup: Callable[[str], str]) -> Iterator[Check]:
    """The other pinned libraries; an absent one is missed only by the commands that use it."""
    for name in PINS:
        found = lookup(name)
        if name in TRIO:
            continue
        if found == PINS[name]:
            yield Check(name, "ok", found)
        else:
            yield Check(name, "warn", found or "absent", f"tested with {PINS[name]}; 'make setup' installs it")


def check_machine() -> Check:
    """Cores and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory / 1e9:.1f} GB of memory"
    if memory < 2e9:
        return Check("machine", "warn", found, "two processes need about 2 GB")
    return Check("machine", "ok", found)


def check_compiler(which: Callable[[str], str | None]) -> Check:
    """A C++ compiler, which building from source needs."""
    found = which("c++") or which("g++") or which("clang++")
    if found is None:
        return Check("compiler", "warn", "no C++ compiler", "install g++ (only building from source needs it)")
    return Check("compiler", "ok", found)


def check_space(name: str, folder: Path, least_bytes: int, fix: str) -> Check:
    """Free space of the file system of ``folder``."""
    if not folder.is_dir():
        return Check(name, "warn", f"{folder} is absent", fix)
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free in {folder}"
    return Check(name, "warn", found, fix) if free < least_bytes else Check(name, "ok", found)


def tried(name: str, program: str, fix: str) -> Check:
    """Runs a Python program in a process of its own, which may crash; its output is the finding."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(name, "fail", f"no answer within {LIMIT_S} s", fix)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Check(name, "fail", f"exit code {done.returncode}: {last}", fix)
    return Check(name, "ok", done.stdout.strip())


def check_kernels() -> Check:
    """The compiled kernels of tables."""
    found = tried("kernels", KERNELS_TRIAL, "install again: 'make setup' in a fresh checkout")
    if found.state == "ok" and not found.found.startswith("compiled"):
        what, _, fix = found.found.partition("; ")
        return Check("kernels", "warn", what, fix)
    return found


def check_processes() -> Check:
    """Two processes that add a number with gloo, started as training starts them."""
    from thresher.launch.failure import RankFailed
    from thresher.launch.processes import run_ranks

    with tempfile.TemporaryDirectory(prefix="thresher-doctor-") as folder:
        try:
            run_ranks(["-m", "thresher.launch.probe", str(LIMIT_S)], 2, Path(folder), 1)
        except RankFailed as error:
            return Check(
                "processes", "fail", str(error), "allow connections on the loopback interface; see GLOO_SOCKET_IFNAME"
            )
    return Check("processes", "ok", "two processes talk over gloo")
