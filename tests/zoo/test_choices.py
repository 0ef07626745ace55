"""Configurations that do not fit the schema, and the registry: one clear message each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zoo.data import CPU, batch_of, shop, with_ids
from thresher.data.schema import Schema
from thresher.embeddings.tables import module_name
from thresher.errors import ConfigError, SchemaError, ThresherError
from thresher.trainer.config import load_config
from thresher.trainer.model import ModelConfig
from thresher.zoo.blocks.inputs import choose_inputs
from thresher.zoo.din.model import DinConfig
from thresher.zoo.din.pairs import AttentionConfig, choose_pairs
from thresher.zoo.fm.model import FmConfig
from thresher.zoo.lr.model import LrConfig
from thresher.zoo.registry import RunConfig
from thresher.zoo.sasrec.model import SasRecConfig

SHOP = shop().model_dump()
FEATURES: list[dict[str, Any]] = list(SHOP["features"])


def without(*names: str) -> Schema:
    return shop(features=[f for f in FEATURES if f["name"] not in names])


def having(*features: dict[str, Any]) -> Schema:
    return shop(features=[*FEATURES, *features])


def attend(**choice: Any) -> DinConfig:
    return DinConfig(attention=(AttentionConfig(**choice),))


SECOND_ITEM = {"kind": "sparse", "name": "seen", "table": "items"}
SECOND_SEQUENCE = {"kind": "sequence", "name": "likes", "table": "items", "max_length": 3}
WEIGHTED = {"kind": "sparse", "name": "hits", "table": "tags", "many": True, "weights": "hit_weights"}

FAULTS: dict[str, tuple[ModelConfig, Schema, type[ThresherError], str]] = {
    "unknown feature": (
        LrConfig(features=("itm",)),
        shop(),
        ConfigError,
        "ConfigError: model.features: no feature 'itm' of schema 'shop'. Did you mean 'item'?",
    ),
    "label as input": (
        LrConfig(features=("click",)),
        shop(),
        ConfigError,
        "model.features: 'click' is a label, not an input of schema 'shop'",
    ),
    "float side column": (
        LrConfig(features=("history.dwell",)),
        shop(),
        ConfigError,
        "'history.dwell' is a float side column, not an input",
    ),
    "no ids": (LrConfig(features=("price",)), shop(), ConfigError, "the model reads no id feature of schema 'shop'"),
    "no label": (
        LrConfig(),
        without("click", "rating"),
        SchemaError,
        "SchemaError: schema 'shop': no label to predict. Declare a feature of kind label",
    ),
    "unknown label": (
        FmConfig(labels=("clickk",)),
        shop(),
        ConfigError,
        "model.labels: no label 'clickk'. Did you mean 'click'? Allowed: click, rating",
    ),
    "label twice": (FmConfig(labels=("click", "click")), shop(), ConfigError, "label 'click' is given twice"),
    "weighted mean": (
        LrConfig(),
        having(WEIGHTED),
        ConfigError,
        "model.pooling: the mean of weighted ids is not defined, and hits carry weights. Set pooling: sum",
    ),
    "din without a sequence": (
        DinConfig(),
        without("history"),
        SchemaError,
        "no sequence among the inputs shares its table with exactly one sparse feature of one id",
    ),
    "din with two targets": (DinConfig(), having(SECOND_ITEM), SchemaError, "exactly one sparse feature"),
    "din, unnamed of two targets": (
        attend(sequence="history"),
        having(SECOND_ITEM),
        ConfigError,
        "model.attention[0].target: 2 sparse features of one id use table 'items' of sequence 'history'. "
        "Name one of them: item, seen",
    ),
    "din, no target at all": (
        attend(sequence="history"),
        without("item"),
        ConfigError,
        "0 sparse features of one id use table 'items' of sequence 'history'. Declare one in the schema",
    ),
    "din, unknown sequence": (
        attend(sequence="historyy"),
        shop(),
        ConfigError,
        "model.attention[0].sequence: no sequence 'historyy'. Did you mean 'history'?",
    ),
    "din, target of another table": (
        attend(sequence="history", target="user"),
        shop(),
        ConfigError,
        "model.attention[0].target: 'user' uses table 'users', the sequence 'items'; they must share one table",
    ),
    "din, unknown target": (
        attend(sequence="history", target="itm"),
        shop(),
        ConfigError,
        "no sparse feature of one id 'itm'. Did you mean 'item'?",
    ),
    "din, target of many ids": (
        attend(sequence="history", target="tags"),
        shop(),
        ConfigError,
        "no sparse feature of one id 'tags'",
    ),
    "din, unknown side column": (
        attend(sequence="history", side={"categry": "category"}),
        shop(),
        ConfigError,
        "model.attention[0].side: sequence 'history' has no id side column 'categry'. Did you mean 'category'?",
    ),
    "din, side of another table": (
        attend(sequence="history", side={"category": "user"}),
        shop(),
        ConfigError,
        "model.attention[0].side.category: 'user' uses table 'users', the sequence 'categories'",
    ),
    "din, sequence left out": (
        DinConfig(features=("user", "item"), attention=(AttentionConfig(sequence="history"),)),
        shop(),
        ConfigError,
        "model.attention[0]: 'history' is not among model.features. Add 'history' there",
    ),
    "din, sequence twice": (
        DinConfig(attention=(AttentionConfig(sequence="history"), AttentionConfig(sequence="history"))),
        shop(),
        ConfigError,
        "model.attention[1]: sequence 'history' is attended twice",
    ),
    "sasrec without a sequence": (
        SasRecConfig(),
        without("history"),
        SchemaError,
        "schema 'shop': no sequence feature. Declare the history of items",
    ),
    "sasrec, unnamed of two sequences": (
        SasRecConfig(),
        having(SECOND_SEQUENCE),
        ConfigError,
        "model.sequence: 2 sequences. Name one: history, likes",
    ),
    "sasrec, unknown sequence": (
        SasRecConfig(sequence="hist"),
        shop(),
        ConfigError,
        "model.sequence: no sequence 'hist'. Did you mean 'history'?",
    ),
    "sasrec without a target": (
        SasRecConfig(),
        without("item"),
        SchemaError,
        "no sparse feature of one id uses table 'items' of sequence 'history'",
    ),
    "sasrec, unnamed of two targets": (
        SasRecConfig(),
        having(SECOND_ITEM),
        ConfigError,
        "model.target: 2 features use table 'items'. Name one: item, seen",
    ),
    "sasrec, target of another table": (
        SasRecConfig(target="user"),
        shop(),
        ConfigError,
        "model.target: no sparse feature of one id 'user' on table 'items'. Allowed: item",
    ),
    "sasrec, too few items": (
        SasRecConfig(),
        shop(tables=[t | {"rows": 3} if t["name"] == "items" else t for t in SHOP["tables"]]),
        SchemaError,
        "table 'items': 3 row(s) leave fewer than two items. Give it more rows",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_what_does_not_fit_is_refused_with_place_and_cure(fault: str) -> None:
    config, schema, kind, message = FAULTS[fault]
    with pytest.raises(kind) as caught:
        config.build(schema, torch.device("meta"))
    assert type(caught.value) is kind
    assert message in caught.value.message


def test_inputs_default_to_all_and_keep_the_order_of_the_schema() -> None:
    schema = shop()
    assert choose_inputs(schema, ()).keys == tuple(schema.id_tables)
    some = choose_inputs(schema, ("age", "history.category", "item"))
    assert (some.keys, some.dense) == (("item", "history.category"), (1,))


def test_features_not_chosen_have_no_influence() -> None:
    schema = shop()
    model = FmConfig(features=("item", "age")).build(schema, CPU)
    one, other = batch_of(schema, 8, seed=0), batch_of(schema, 8, seed=1)
    items = [[row] for row in one.sparse["item"].values().tolist()]
    dense = torch.stack([other.dense[:, 0], one.dense[:, 1]], 1)
    mixed = replace(with_ids(other, "item", items), dense=dense)
    assert torch.equal(model(one)["click"], model(mixed)["click"])
    assert not torch.equal(model(one)["click"], model(other)["click"])


def test_din_finds_its_pairs_by_shared_tables() -> None:
    (pair,) = choose_pairs(shop(), (), tuple(shop().id_tables))
    assert (pair.history, pair.target) == (("history", "history.category"), ("item", "category"))
    explicit = (AttentionConfig(sequence="history", side={"category": "category"}),)
    assert choose_pairs(shop(), explicit, tuple(shop().id_tables)) == (pair,)
    (plain,) = choose_pairs(shop(), (AttentionConfig(sequence="history"),), tuple(shop().id_tables))
    assert plain.history == ("history",)


def test_din_attends_several_sequences() -> None:
    schema = having(SECOND_SEQUENCE)
    model = DinConfig(dim=4).build(schema, CPU)
    assert [pair.history[0] for pair in model.pairs] == ["history", "likes"]
    batch = batch_of(schema, 4)
    model.loss(model(batch), batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_names_torch_keeps_for_itself_get_underscores() -> None:
    tables = [{"name": name, "rows": 9} for name in ("items", "items_", "type", "product")]
    schema = Schema.model_validate({"name": "s", "tables": tables, "features": FEATURES[-1:]})
    assert [module_name(schema, t.name) for t in schema.tables] == ["items__", "items_", "type_", "product"]


def run_file(tmp_path: Path, model: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: x\ndata: {{path: somewhere}}\nmodel: {model}\n")
    return path


@pytest.mark.parametrize("name", ["lr", "fm", "deepfm", "dlrm", "dcnv2", "din", "sasrec"])
def test_every_model_has_a_name_in_a_run_file(tmp_path: Path, name: str) -> None:
    config = load_config(RunConfig, run_file(tmp_path, f"{{name: {name}}}"))
    assert config.model.name == name
    schema = shop()
    batch = batch_of(schema, 4)
    model = config.model.build(schema, CPU)
    assert torch.isfinite(model.loss(model(batch), batch))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{name: deepfn}", "model.name: 'deepfn' is not known. Did you mean 'deepfm'?"),
        ("{name: deepfm, dims: 3}", "model.dims: unknown key. Did you mean 'dim'?"),
        ("{name: deepfm, mlp: {hiddenn: [3]}}", "model.mlp.hiddenn: unknown key. Did you mean 'hidden'?"),
        ("{name: dcnv2, cross: ful}", "model.cross: 'ful' is not known. Did you mean 'full'?"),
        ("{}", "model.name: required key is absent"),
        ("{name: dlrm, dim: 6}", "model.dim"),
        ("{name: sasrec, heads: 3}", "dim 64 is not a multiple of heads 3"),
        ("{name: din, attention: [{sequence: a, targett: b}]}", "Did you mean 'target'?"),
    ],
)
def test_a_run_file_with_a_wrong_model_names_the_nearest(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, run_file(tmp_path, model))
    assert message in caught.value.message
