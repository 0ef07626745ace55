"""What a run is built from before its first step: measured lookups and the plan."""

from pathlib import Path

import pytest
import torch

from tests.trainer.test_run import Job
from thresher.data.dataset import Dataset
from thresher.data.prepare import prepare
from thresher.data.recipes.synthetic import Synthetic
from thresher.embeddings.tables import find_tables
from thresher.trainer.assemble import measured, plan_of


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
