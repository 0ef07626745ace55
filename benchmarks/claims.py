"""Measures again what the project claims: ``python -m benchmarks.claims [ID | AREA ...] [--quick]``.

Claims stand in ``benchmarks/claims.yaml``. Each names a command that writes JSON and the place of its figure there;
claims with the same command share one run of it. The table says which ``hold`` and which ``fall short``; the exit code
is 0 when all hold. ``--record`` writes the figures and the date back,
``--readme`` rewrites the list in the README from them.
"""

import argparse
import datetime
import json
import math
import operator
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from thresher.errors import ConfigError, ThresherError, nearest
from thresher.settings import Settings, parse, read_yaml

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "benchmarks" / "claims.yaml"
README = ROOT / "README.md"
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


class Measured(Settings):
    """The last recorded figure, when and on what it was taken."""

    value: float
    date: str
    commit: str
    hardware: str


class Claim(Settings):
    """One number the project stands for.

    Attributes:
        id: ``area.point``.
        claim: the sentence; ``{value}`` stands for the measured figure.
        command: writes its JSON to the file that ``{json}`` stands for.
        quick: the same in less time, less exact; empty where there is no such way.
        figure: dotted path of the figure in that JSON.
        compare, bound: what the figure must satisfy.
        measured: None until it is recorded for the first time.
        readme: whether the README lists it.
        note: what falls short and why; empty where nothing does.
    """

    id: str = Field(pattern=r"^[a-z]+\.[a-z0-9_]+$")
    claim: str
    command: str
    quick: str = ""
    figure: str
    compare: Literal[">=", "<=", "==", ">", "<"]
    bound: float
    measured: Measured | None = None
    readme: bool = False
    note: str = ""

    def holds(self, value: float) -> bool:
        """Whether ``value`` satisfies the bound; NaN does not."""
        return not math.isnan(value) and COMPARE[self.compare](value, self.bound)


class Claims(Settings):
    """The file."""

    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Outcome:
    """A claim measured again; ``value`` is NaN where the command failed, and ``problem`` says how."""

    claim: Claim
    value: float
    environment: dict[str, Any]
    problem: str = ""

    @property
    def verdict(self) -> str:
        """``holds``, ``falls short``, or what went wrong."""
        return self.problem or ("holds" if self.claim.holds(self.value) else "falls short")


def load(path: Path = CLAIMS) -> tuple[Claim, ...]:
    """All claims.

    Raises:
        ConfigError: the file is no list of claims, or an id stands there twice.
    """
    claims = parse(Claims, read_yaml(path), str(path)).claims
    ids = [claim.id for claim in claims]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    if twice:
        raise ConfigError(f"claim '{twice[0]}' stands there twice", where=str(path), fix="give each its own id")
    return claims


def select(claims: tuple[Claim, ...], wanted: list[str]) -> tuple[Claim, ...]:
    """The claims whose id or area is wanted; all for an empty list.

    Raises:
        ConfigError: a wanted id or area does not exist.
    """
    known = {claim.id for claim in claims} | {claim.id.partition(".")[0] for claim in claims}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"no claim or area '{name}'", where="benchmarks.claims", fix=nearest(name, known))
    return tuple(c for c in claims if not wanted or c.id in wanted or c.id.partition(".")[0] in wanted)


def measure(claims: tuple[Claim, ...], quick: bool, say: Callable[[str], None]) -> list[Outcome]:
    """Runs each distinct command once and reads every claim's figure from its JSON."""
    outcomes: list[Outcome] = []
    runs: dict[str, dict[str, Any] | str] = {}
    for claim in claims:
        command = claim.quick if quick and claim.quick else claim.command
        if command not in runs:
            say(f"$ {command}")
            runs[command] = run(command)
        outcomes.append(_outcome(claim, runs[command]))
    return outcomes


def run(command: str) -> dict[str, Any] | str:
    """The JSON a command writes, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "figures.json"
        words = [sys.executable if word == "python" else word for word in shlex.split(command.format(json=target))]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            return f"exit code {done.returncode}: {last}"
        if not target.exists():
            return "the command wrote no JSON"
        figures: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return figures


def _outcome(claim: Claim, figures: dict[str, Any] | str) -> Outcome:
    if isinstance(figures, str):
        return Outcome(claim, math.nan, {}, figures)
    value: Any = figures
    for part in claim.figure.split("."):
        if not isinstance(value, dict) or part not in value:
            return Outcome(claim, math.nan, {}, f"no figure '{claim.figure}'")
        value = value[part]
    return Outcome(claim, float(value), figures.get("environment", {}))


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints one row a claim."""
    table = Table("claim", "figure", "bound", "verdict", "last recorded", title="Claims")
    for outcome in outcomes:
        claim, measured = outcome.claim, outcome.claim.measured
        last = f"{measured.value:.4g} ({measured.date})" if measured else "never"
        table.add_row(claim.id, f"{outcome.value:.4g}", f"{claim.compare} {claim.bound:g}", outcome.verdict, last)
    console.print(table)


def record(outcomes: list[Outcome], path: Path = CLAIMS) -> None:
    """Writes the figures of measured claims back to the file, keeping its other text as it is."""
    lines = path.read_text(encoding="utf-8").splitlines()
    today = datetime.date.today().isoformat()
    for outcome in outcomes:
        if math.isnan(outcome.value):
            continue
        environment = outcome.environment
        entry = json.dumps(
            {
                "value": float(f"{outcome.value:.5g}"),
                "date": environment.get("date", today)[:10],
                "commit": environment.get("commit", "unknown"),
                "hardware": _hardware(environment),
            }
        )
        start = next(i for i, line in enumerate(lines) if line.strip() == f"- id: {outcome.claim.id}")
        stop = next((i for i in range(start + 1, len(lines)) if lines[i].strip().startswith("- id:")), len(lines))
        block = [line for line in lines[start:stop] if not line.strip().startswith("measured:")]
        last = max(i for i, line in enumerate(block) if line.strip())
        lines[start:stop] = [*block[: last + 1], f"    measured: {entry}", *block[last + 1 :]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _hardware(environment: dict[str, Any]) -> str:
    """A word on the machine: the accelerator, or processor and cores."""
    if environment.get("device", "cpu") != "cpu":
        return str(environment["device"])
    return f"{environment.get('cpu', 'unknown')}, {environment.get('cores', '?')} cores"


def readme_block(claims: tuple[Claim, ...]) -> str:
    """The README's list of figures, from the recorded ones."""
    rows = ["| what | figure | measured | command |", "|---|---|---|---|"]
    for claim in claims:
        if claim.readme and claim.measured:
            value, where = f"{claim.measured.value:.4g}", f"{claim.measured.date}, {claim.measured.hardware}"
            short = "" if claim.holds(claim.measured.value) else f" (short of {claim.compare} {claim.bound:g})"
            command = f"`python -m benchmarks.claims {claim.id}`"
            rows.append(f"| {claim.claim} | {value}{short} | {where} | {command} |")
    return "\n".join([BEGIN, *rows, END])


def write_readme(claims: tuple[Claim, ...], path: Path = README) -> None:
    """Puts :func:`readme_block` between the README's markers."""
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(head + readme_block(claims) + tail, encoding="utf-8")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", help="claim ids or areas; all by default")
    parser.add_argument("--quick", action="store_true", help="shorter, less exact commands where a claim has one")
    parser.add_argument("--record", action="store_true", help="write the figures back to claims.yaml")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's figures from claims.yaml and stop")
    arguments = parser.parse_args()
    console = Console()
    try:
        if arguments.readme:
            write_readme(load())
            return 0
        outcomes = measure(select(load(), arguments.ids), arguments.quick, console.print)
    except ThresherError as error:
        console.print(error.message, style="red", markup=False)
        return 2
    show(outcomes, console)
    if arguments.record:
        record(outcomes)
    return 0 if all(outcome.verdict == "holds" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
