"""What the handbook shows can be typed: its configurations are taken, its commands exist, its files are there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from thresher.launch.cli import app
from thresher.settings import parse
from thresher.zoo.registry import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("thresher/zoo/*/README.md"))]
LEAST = {"name": "page", "data": {"path": "data"}, "model": {"name": "lr"}}


def examples(language: str) -> list[object]:
    found = [
        pytest.param(body, id=f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
        for page in PAGES
        for match in re.finditer(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
        for body in [match[1]]
    ]
    assert found, language
    return found


@pytest.mark.parametrize("text", examples("yaml"))
def test_a_configuration_in_the_handbook_is_taken(text: str) -> None:
    parse(RunConfig, LEAST | yaml.safe_load(text), "handbook")


@pytest.mark.parametrize("text", examples("python"))
def test_python_in_the_handbook_compiles(text: str) -> None:
    compile(text, "handbook", "exec")


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_an_example_is_taken(path: Path) -> None:
    parse(RunConfig, yaml.safe_load(path.read_text()), path.name)


def test_commands_in_the_handbook_exist() -> None:
    written = {
        words[1 : 3 if words[1] == "data" else 2]
        for page in PAGES
        for match in re.finditer(r"`(thresher (?:data \w+|[a-z]+)[^`]*)`", page.read_text())
        for words in [tuple(shlex.split(match[1].replace("[", "").replace("]", "")))]
    }
    assert len(written) >= 7
    for words in sorted(written):
        assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0, words


def test_files_that_the_handbook_names_are_there() -> None:
    named = r"`((?:thresher|tests|benchmarks|docs|examples)/[\w./]+\w)`"
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(named, page.read_text())
        if not (ROOT / name).exists()
    ]
    assert missing == []
