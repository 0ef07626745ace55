"""What a run is built from before its first step: measured lookups and the plan."""

from pathlib import Path

import pytest
import torch

from tests.trainer.test_run import Job
from thresher.data.dataset import Dataset
from thresher.data.prepare import prepare
from thresher.data.recipes.synthetic import Synthetic
from thresher.data.schema import Schema
from thresher.embeddings.tables import find_tables
from thresher.errors import ConfigError
from thresher.sharding.dynamic import check_dynamic
from thresher.trainer.assemble import dynamic_tables, measured, plan_of


def test_lookups_are_measured_on_the_first_training_rows_and_shown_in_the_plan(tmp_path: Path) -> None:
    prepare(Synthetic(rows=2000), tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    config = Job(tmp_path, {"sharding.measure_rows": 300, "sharding.default": "table_wise"}).config(2)
    model = config.model.build(dataset.schema, torch.device("meta"))
    found = measured(config, dataset, model)
    assert sorted(found) == sorted(info.path for info in find_tables(model))
    assert found == measured(config, dataset, model)
    for frequency in found.values():
        assert 0 < frequency.distinct <= 1
        assert sum(frequency.blocks) == pytest.approx(1)
    plan = plan_of(config, model, 2, 2, "cpu", found)
    assert all(table.lookups == sum(found[table.path].lookups) for table in plan.tables)
    unmeasured = Job(tmp_path).config(2)
    assert measured(unmeasured, dataset, model) == {}


def test_tables_with_raw_ids_give_rows_as_they_are_told_and_are_cut_by_rows(tmp_path: Path) -> None:
    prepare(Synthetic(rows=2000), tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    first, *others = dataset.schema.tables
    schema = dataset.schema.model_copy(update={"tables": (first.model_copy(update={"ids": "raw"}), *others)})
    config = Job(tmp_path, {f"dynamic.{first.name}": {"min_count": 3}}).config(2)
    found = dynamic_tables(config, schema)
    assert {name: table.min_count for name, table in found.items()} == {first.name: 3}
    assert dynamic_tables(Job(tmp_path).config(2), schema)[first.name].min_count == 1
    model = config.model.build(schema, torch.device("meta"))
    plan = plan_of(config, model, 2, 2, "cpu", raw=found)
    assert {table.sharding_type for table in plan.tables if table.table == first.name} == {"row_wise"}
    with pytest.raises(ConfigError, match=f"dynamic.{first.name}: the data have no table '{first.name}' with raw ids"):
        dynamic_tables(config, dataset.schema)


def test_a_table_with_raw_ids_has_its_name_of_the_model(tmp_path: Path) -> None:
    tables = [{"name": "items", "rows": 9, "ids": "raw"}]
    features = [{"kind": "sparse", "name": "item", "table": "items"}, {"kind": "label", "name": "label"}]
    schema = Schema.model_validate({"name": "s", "tables": tables, "features": features})
    config = Job(tmp_path, {"dynamic.items": {"min_count": 3}}).config(2)
    found = dynamic_tables(config, schema)
    assert {name: table.min_count for name, table in found.items()} == {"items_": 3}
    plan = plan_of(config, config.model.build(schema, torch.device("meta")), 2, 2, "cpu", raw=found)
    check_dynamic(plan, found, None)
    assert {table.table: table.sharding_type for table in plan.tables}["items_"] == "row_wise"
