"""The generator: rows are functions of their numbers, ids are Zipf, the planted structure is what is stated."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from thresher.data.parse import parse
from thresher.data.prepare import prepare
from thresher.data.recipes.synthetic import Synthetic
from thresher.errors import ConfigError
from thresher.settings import parse as parse_settings

SMALL = Synthetic(
    rows=1000, sparse=3, many=1, dense=2, sequences=2, sequence_length=6, table_rows=50, valid=0.2, test=0.1
)


def table(recipe: Synthetic) -> pa.Table:
    return pa.concat_tables(chunk.table for chunk in recipe.chunks())


def logits(recipe: Synthetic, rows: int) -> np.ndarray:
    return recipe._logit(recipe._features(np.arange(rows)))


def test_golden_rows() -> None:
    """Data sets of tests and scale runs are named by their options alone: these rows must not change."""
    row = table(SMALL).slice(998, 1).to_pylist()[0]
    dense = [row.pop("dense_0"), row.pop("dense_1")]
    assert row == {
        "sparse_0": 37,
        "sparse_1": 38,
        "sparse_2": 37,
        "many_0": [46, 13],
        "history_0": [39, 21, 13, 32, 39, 8],
        "history_1": [15, 19, 12, 7, 31],
        "label": 0.0,
        "time": 1700000998,
        "group": 37,
    }
    assert dense == pytest.approx([-0.03217510808379892, -0.9391533340976111], abs=1e-12)


@pytest.mark.parametrize("chunk_rows", [3, 64, 333, 1000])
def test_chunks_do_not_matter(chunk_rows: int) -> None:
    whole, parts = table(SMALL), list(SMALL.model_copy(update={"chunk_rows": chunk_rows}).chunks())
    assert pa.concat_tables(part.table for part in parts).equals(whole)
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(1, 1001))
    counts = {split: sum(len(part.rows) for part in parts if part.split == split) for split in ("valid", "test")}
    assert counts == {"valid": 200, "test": 100}


def test_follows_its_schema() -> None:
    parsed = parse(table(SMALL), SMALL.data_schema())
    assert not parsed.bad
    assert parsed.table.num_rows == 1000


def test_seeds_differ() -> None:
    assert not table(SMALL).equals(table(SMALL.model_copy(update={"seed": 1})))


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
def test_ids_are_zipf(exponent: float) -> None:
    recipe = Synthetic(rows=400_000, zipf=exponent, table_rows=1000, valid=0, test=0)
    counts = np.sort(np.bincount(recipe._ids(np.arange(400_000), "sparse_0", "sparse_0"), minlength=1000))[::-1]
    ranks = np.array([10, 400])  # far from the head, where the continuous law rounds
    slope = -np.log(counts[ranks[1] - 5 : ranks[1] + 5].mean() / counts[ranks[0] - 2 : ranks[0] + 3].mean())
    assert slope / np.log(ranks[1] / ranks[0]) == pytest.approx(exponent, abs=0.1)


@pytest.mark.parametrize("rows", [2, 3, 10, 997, 1000, 4096])
def test_every_id_may_occur_and_none_else(rows: int) -> None:
    recipe = Synthetic(zipf=0.0, table_rows=rows)
    assert np.unique(recipe._ids(np.arange(60 * rows), "sparse_0", "sparse_0")).tolist() == list(range(rows))


def test_frequent_ids_are_not_neighbours() -> None:
    ids = Synthetic(zipf=1.2, table_rows=10_000)._ids(np.arange(100_000), "sparse_0", "sparse_0")
    top = np.sort(np.argsort(-np.bincount(ids))[:8])
    assert np.diff(top).min() > 100


def test_bayes_auc_is_that_of_the_true_odds() -> None:
    recipe = Synthetic(rows=60_000)
    score = roc_auc_score(table(recipe)["label"].to_numpy(), logits(recipe, 60_000))
    assert recipe.facts()["bayes_auc"] == pytest.approx(score, abs=0.005)  # three standard errors of the score


@pytest.mark.parametrize("part", ["first_order", "pairwise", "affinity"])
def test_strengths_are_standard_deviations(part: str) -> None:
    strengths = {"first_order": 0.0, "pairwise": 0.0, "affinity": 0.0} | {part: 2.0}
    planted = logits(Synthetic(zipf=0.0, bias=-0.5, sequences=2, many=0, **strengths), 20_000)
    assert planted.std() == pytest.approx(2.0, rel=0.05)
    assert planted.mean() == pytest.approx(-0.5, abs=0.1)


def test_pairwise_structure_is_hidden_from_single_fields() -> None:
    recipe = Synthetic(zipf=0.0, first_order=0.0, affinity=0.0, pairwise=2.0, table_rows=50, sparse=2, bias=0.0)
    planted = logits(recipe, 100_000)
    ids = recipe._ids(np.arange(100_000), "sparse_0", "sparse_0")
    means = np.bincount(ids, planted) / np.bincount(ids)
    assert means.std() < 0.3 * planted.std()


def test_memory_does_not_grow_with_the_rows() -> None:
    peaks = []
    for rows in (10_000, 60_000):
        tracemalloc.start()
        for _ in Synthetic(rows=rows, chunk_rows=5000).chunks():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_prepared(tmp_path: Path) -> None:
    dataset = prepare(SMALL, tmp_path / "s", max_bad_share=0.0)
    assert 0.5 < dataset.manifest.facts["bayes_auc"] < 1
    assert dataset.split("train").rows == 700


def test_sequences_need_targets() -> None:
    with pytest.raises(ConfigError, match="3 sequences need as many sparse fields as targets, not 2"):
        parse_settings(Synthetic, {"sparse": 2, "sequences": 3}, "options")
