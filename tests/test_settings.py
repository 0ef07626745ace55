"""What settings say about values that do not fit, and that no input makes them fail in another way."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from thresher.errors import ConfigError
from thresher.settings import Settings, apply_override, parse, parse_yaml, read_yaml
from thresher.trainer.config import load_config
from thresher.zoo.registry import RunConfig


class Inner(Settings):
    width: Annotated[int, Field(ge=1)] = 1
    share: float = 0.5


class Circle(Settings):
    kind: Literal["circle"] = "circle"
    radius: float


class Square(Settings):
    kind: Literal["square"] = "square"
    side: float
    inner: Inner = Inner()


class Drawing(Settings):
    title: str
    shapes: tuple[Annotated[Circle | Square, Field(discriminator="kind")], ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)
    limit: int | None = None


def told(values: object, source: str = "drawing", **more: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(Drawing, values, source, **more)
    return caught.value


def test_valid_values_become_frozen_settings() -> None:
    drawing = parse(Drawing, {"title": "x", "shapes": [{"kind": "square", "side": 2}]}, "drawing")
    assert drawing.shapes == (Square(side=2.0),)
    with pytest.raises(ValueError, match="frozen"):
        drawing.title = "y"


@pytest.mark.parametrize(
    ("values", "where", "what", "fix"),
    [
        ({}, "drawing: title", "required key is absent", "add 'title'"),
        ({"title": "x", "shapse": 1}, "drawing: shapse", "unknown key", "did you mean 'shapes'?"),
        ({"title": "x", "shapes": [{"kind": "circle", "radios": 1}]}, "drawing", "2 faults", ""),
        (
            {"title": "x", "shapes": [{"kind": "circel"}]},
            "drawing: shapes[0].kind",
            "'circel' is not known",
            "'circle'",
        ),
        (
            {"title": "x", "shapes": [{"side": 1}]},
            "drawing: shapes[0].kind",
            "required key is absent",
            "circle, square",
        ),
        (
            {"title": "x", "shapes": [{"kind": "square", "side": 1, "inner": {"wide": 1}}]},
            "drawing: shapes[0].inner.wide",
            "unknown key",
            "Allowed: share, width",
        ),
        ({"title": "x", "named": {"a": {"width": 0}}}, "drawing: named.a.width", "at least 1, got 0", "at least 1"),
        ({"title": "x", "named": {"a": {"widht": 0}}}, "drawing: named.a.widht", "unknown key", "'width'"),
        ({"title": "x", "named": {"a": {"width": True}}}, "drawing: named.a.width", "got true", "write a number"),
        ({"title": "x", "limit": [1]}, "drawing: limit", "expects a whole number, got [1]", "write a whole number"),
        ({"title": "x", "shapes": {"a": 1}}, "drawing: shapes", "expects a list, got keys (a)", "[a, b]"),
        ([], "drawing", "expects keys, got []", "'key: value' lines"),
    ],
)
def test_one_fault_is_placed_and_cured(values: object, where: str, what: str, fix: str) -> None:
    error = told(values)
    assert error.where == where
    assert what in error.what
    assert fix in error.fix


def test_five_faults_are_listed_unknown_keys_first() -> None:
    error = told({"title": 1, "limit": "x", "shapes": 3, "a": 1, "named": {str(i): {"width": 0} for i in range(4)}})
    lines = error.what.splitlines()
    assert lines[0] == "8 faults"
    assert lines[1].strip().startswith("drawing: a: unknown key")
    assert lines[-1].strip() == "and 3 more"
    assert len(lines) == 7


def test_lines_of_the_file_and_overrides_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "drawing.yaml"
    file.write_text("title: x\nshapes:\n  - kind: square\n    side: wide\nlimit: none\n")
    error = told(read_yaml(file), str(file))
    assert f"{file}:4: shapes[0].side" in error.what
    assert f"{file}:5: limit" in error.what
    values = read_yaml(file)
    overridden = [apply_override(values, "limit=some")]
    assert "override limit: expects a whole number, got 'some'" in told(values, str(file), overridden=overridden).what


def test_override_leaves_the_twin_of_an_anchor_alone() -> None:
    values = parse_yaml("a: &one {x: 1}\nb: *one\n", "text")
    assert apply_override(values, "a.x=2") == ("a", "x")
    assert values == {"a": {"x": 2}, "b": {"x": 1}}


def test_merge_keys_may_be_overridden_without_counting_as_twins() -> None:
    assert parse_yaml("a: &one {x: 1, y: 1}\nb: {<<: *one, x: 2}\n", "text")["b"] == {"x": 2, "y": 1}


VALID: dict[str, Any] = {
    "name": "fuzz",
    "data": {"path": "d", "options": {"rows": 3}},
    "model": {"name": "din", "mlp": {"hidden": [8]}, "attention": [{"sequence": "h"}]},
    "sharding": {"tables": {"users": "row_wise"}},
    "train": {"batch_size": 64, "epochs": 0.5},
    "optim": {"dense": {"betas": [0.9, 0.99]}, "schedule": {"kind": "cosine"}},
    "eval": {"at": [10], "early_stop": {"metric": "auc"}},
    "launch": {"device": "cpu"},
}
STRANGE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.sampled_from(["", "lr", "1e-3", "din", "auto", "\x00", "../..", "-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def places(values: object, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything inside ``values``."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, value in entries for found in ((*way, key), *places(value, (*way, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> object:
    """The valid configuration with up to three places renamed, removed, or replaced."""
    values = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(values)))
        inner: Any = values
        for key in way:
            inner = inner[key]
        change = draw(st.sampled_from(["replace", "rename", "remove"]))
        old = inner[last]
        if change == "replace":
            inner[last] = draw(STRANGE)
        elif isinstance(inner, dict):
            del inner[last]
            if change == "rename":
                inner[draw(st.text(max_size=8) | st.sampled_from([f"{last}s", str(last)[1:], "name", "kind"]))] = old
        if not places(values):
            break
    return values


def refusal_of(act: Callable[[], object]) -> ConfigError | None:
    """What ``act`` is refused with; any other exception is a fault of ours."""
    try:
        act()
    except ConfigError as error:
        return error
    return None


def refused_or_built(values: object) -> None:
    error = refusal_of(lambda: parse(RunConfig, values, "fuzz"))
    if error:
        assert error.where.startswith("fuzz")
        assert "pydantic" not in error.message
        assert len(error.message) < 3000


@given(mutated())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_configurations_are_built_or_refused(values: object) -> None:
    refused_or_built(values)


@pytest.mark.slow
@given(mutated())
@settings(max_examples=3_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_mutated_configurations_are_built_or_refused(values: object) -> None:
    refused_or_built(values)


@given(st.text(max_size=60) | st.text(alphabet="ab:-[]{}&*!|> \n\t'\"#,%@0", max_size=60), st.data())
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_mapping_or_refused(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, 40))
    valid = yaml.safe_dump(VALID)
    for candidate in (text, valid[:at] + text + valid[at:]):
        error = refusal_of(partial(parse_yaml, candidate, "text"))
        assert error is None or error.where.startswith("text")


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_override_is_taken_or_refused(text: str) -> None:
    values = copy.deepcopy(VALID)
    error = refusal_of(lambda: apply_override(values, text))
    assert error is None or error.where
    assert values.keys() >= VALID.keys()


def test_the_valid_configuration_is_valid(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(VALID))
    assert load_config(RunConfig, tmp_path / "run.yaml").model.name == "din"
