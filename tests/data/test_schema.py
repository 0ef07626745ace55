"""Schemas: what they state, their order, and every inconsistency that is refused."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from thresher.data.schema import Schema
from thresher.errors import ConfigError, SchemaError
from thresher.settings import parse

TEXT = """
name: shop
tables:
  - {name: user, rows: 1000}
  - {name: item, rows: 500, ids: vocabulary, min_count: 2}
  - {name: kind, rows: 20, ids: index}
features:
  - {kind: dense, name: price, transform: log1p, fill: -1}
  - {kind: sparse, name: user, table: user}
  - kind: sequence
    name: seen
    table: item
    max_length: 50
    side: [{name: kind, table: kind}, {name: age}]
  - {kind: sparse, name: item, table: item}
  - {kind: sparse, name: tags, table: kind, many: true, weights: tag_weights}
  - {kind: label, name: click}
  - {kind: label, name: watch, task: regression}
  - {kind: weight, name: importance}
  - {kind: time, name: when}
  - {kind: group, name: session}
"""


def load(change: dict[str, Any] | None = None) -> Schema:
    return parse(Schema, yaml.safe_load(TEXT) | (change or {}), "shop.yaml")


def test_columns_come_in_their_order() -> None:
    schema = load()
    assert schema.id_tables == {
        "user": "user",
        "item": "item",
        "tags": "kind",
        "seen": "item",
        "seen.kind": "kind",
    }
    assert list(schema.id_tables) == ["user", "item", "tags", "seen", "seen.kind"]
    assert schema.side_keys == ("seen.kind", "seen.age")
    assert schema.float_side_keys == ("seen.age",)
    assert [feature.name for feature in schema.dense] == ["price"]
    assert [feature.name for feature in schema.labels] == ["click", "watch"]
    assert schema.weight is not None
    assert schema.time is not None
    assert schema.group is not None
    assert (schema.weight.name, schema.time.name, schema.group.name) == ("importance", "when", "session")


def test_what_is_absent_is_none() -> None:
    schema = load({"features": [{"kind": "label", "name": "y"}]})
    assert (schema.weight, schema.time, schema.group, schema.sparse, schema.id_tables) == (None, None, None, (), {})


def test_json_and_back() -> None:
    schema = load()
    assert Schema.model_validate_json(schema.model_dump_json()) == schema


def test_lookups() -> None:
    schema = load()
    assert schema.table("item").min_count == 2
    assert schema.feature("seen").kind == "sequence"
    with pytest.raises(
        SchemaError, match=r"schema 'shop': no table 'items'. Did you mean 'item'\? Allowed: item, kind, user"
    ):
        schema.table("items")
    with pytest.raises(SchemaError, match=r"schema 'shop': no feature 'pric'. Did you mean 'price'\?"):
        schema.feature("pric")


DENSE = {"kind": "dense", "name": "x"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tables": [{"name": "a", "rows": 2}, {"name": "a", "rows": 3}]}, "table 'a' is declared twice"),
    ({"features": [DENSE, DENSE]}, "feature 'x' is declared twice"),
    (
        {"features": [{"kind": "sparse", "name": "u", "table": "users"}]},
        "uses the unknown table 'users'. did you mean 'user'?",
    ),
    (
        {
            "features": [
                {
                    "kind": "sequence",
                    "name": "h",
                    "table": "item",
                    "max_length": 3,
                    "side": [{"name": "s", "table": "no"}],
                }
            ]
        },
        "feature 'h.s' uses the unknown table 'no'",
    ),
    (
        {"features": [{"kind": "time", "name": "a"}, {"kind": "time", "name": "b"}]},
        "at most one feature of kind 'time'",
    ),
    (
        {"features": [{"kind": "group", "name": "a"}, {"kind": "group", "name": "b"}]},
        "at most one feature of kind 'group'",
    ),
    (
        {"features": [{"kind": "weight", "name": "a"}, {"kind": "weight", "name": "b"}]},
        "at most one feature of kind 'weight'",
    ),
    ({"features": [{"kind": "spars", "name": "u", "table": "user"}]}, "sparse"),
    ({"features": [{"kind": "dense", "name": "x", "transform": "log"}]}, "log1p"),
    ({"features": [{"kind": "dense", "name": "2x"}]}, "features[0].name"),
    ({"features": [{"kind": "sequence", "name": "h", "table": "item", "max_length": 0}]}, "max_length"),
    ({"tables": [{"name": "a", "rows": 0}]}, "tables[0].rows"),
    ({"tables": [{"name": "a", "rows": 2, "id": "hash"}]}, "did you mean 'ids'?"),
    ({"feature": []}, "did you mean 'features'?"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(change)
    assert message.lower() in error.value.message.lower()
    assert "shop.yaml" in error.value.message


@given(st.lists(st.sampled_from("abcdef"), max_size=6))
def test_names_are_unique_or_refused(names: list[str]) -> None:
    change = {"features": [{"kind": "dense", "name": name} for name in names]}
    if len(set(names)) == len(names):
        assert [feature.name for feature in load(change).dense] == names
    else:
        with pytest.raises(ConfigError, match="is declared twice"):
            load(change)
