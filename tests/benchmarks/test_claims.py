"""claims.yaml is well formed, its commands exist, the README agrees with it, recording keeps the rest of the file."""

import importlib.util
import shlex
from pathlib import Path

import pytest

from benchmarks.claims import BEGIN, CLAIMS, END, README, Claim, Outcome, load, readme_block, record, select
from thresher.errors import ConfigError

AREAS = ("train", "data", "sharding", "reliability")


def test_every_area_has_claims_and_the_readme_shows_some() -> None:
    claims = load()
    assert {claim.id.partition(".")[0] for claim in claims} >= set(AREAS)
    assert 8 <= sum(claim.readme for claim in claims) <= 20


@pytest.mark.parametrize("claim", load(), ids=lambda claim: claim.id)
def test_commands_name_modules_that_exist_and_write_their_figures(claim: Claim) -> None:
    for command in filter(None, (claim.command, claim.quick)):
        python, flag, module, *rest = shlex.split(command)
        assert (python, flag) == ("python", "-m")
        assert importlib.util.find_spec(module) is not None
        assert rest[rest.index("--json") + 1] == "{json}"
    assert claim.figure.startswith("results.")


def test_the_readme_agrees_with_the_file() -> None:
    text = README.read_text(encoding="utf-8")
    assert BEGIN + text.partition(BEGIN)[2].partition(END)[0] + END == readme_block(load())


def test_recording_writes_the_figure_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(CLAIMS.read_text(encoding="utf-8"), encoding="utf-8")
    before = load(path)
    environment = {"date": "2030-01-02", "commit": "abc", "cpu": "Chip", "cores": 2, "device": "cpu"}
    for value in (1.25, 2.5):
        record([Outcome(before[0], value, environment), Outcome(before[-1], float("nan"), environment)], path)
    after = load(path)
    measured = after[0].measured
    assert measured is not None
    assert (measured.value, measured.date, measured.commit, measured.hardware) == (
        2.5,
        "2030-01-02",
        "abc",
        "Chip, 2 cores",
    )
    assert after[1:] == before[1:]
    assert after[0].model_copy(update={"measured": None}) == before[0].model_copy(update={"measured": None})
    assert path.read_text(encoding="utf-8").startswith("# What the project claims")


def test_twice_the_same_id_is_refused(tmp_path: Path) -> None:
    entry = "- {id: train.x, claim: c, command: c, figure: results.x, compare: '>', bound: 0}\n"
    path = tmp_path / "claims.yaml"
    path.write_text(f"claims:\n{entry}{entry}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"claim 'train\.x' stands there twice"):
        load(path)


def test_ids_and_areas_are_chosen_and_others_refused() -> None:
    claims = load()
    assert {claim.id.partition(".")[0] for claim in select(claims, ["data"])} == {"data"}
    assert select(claims, [claims[0].id]) == claims[:1]
    with pytest.raises(ConfigError, match="no claim or area 'dta'"):
        select(claims, ["dta"])


def test_a_figure_that_is_no_number_holds_nothing() -> None:
    assert not any(claim.holds(float("nan")) for claim in load())
