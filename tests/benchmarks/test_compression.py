"""The benchmark of AUC against bytes: its settings are settings, its book is not written twice, drops are paired."""

from dataclasses import replace

import pytest

from benchmarks import compression
from benchmarks.compression import TASKS, WAYS, Book, Run, configured, outcome, plot, results_of, rows_of
from thresher.settings import parse
from thresher.zoo.registry import RunConfig


def run_of(way: str, seed: int, auc: float, share: float = 1.0) -> Run:
    return Run("criteo", "deepfm", way, seed, "test", auc, share, {}, (), 10, 1.0)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(TASKS))
def test_every_way_is_a_run_file(name, way, monkeypatch):
    monkeypatch.setattr(compression, "steps_of", lambda task: 100)
    for model in TASKS[name].models:
        config = parse(RunConfig, configured(TASKS[name], model, WAYS[way], 3, "test", 0.3066), "test")
        assert config.seed == 3
        assert config.tiers.enabled == bool(WAYS[way].tiers)
        assert config.fields.drops == (WAYS[way].prune >= 0)
    if WAYS[way].tiers.get("budget") in WAYS:
        assert config.tiers.budget == "30.660%"


def test_a_run_in_the_book_is_not_trained_again(tmp_path, monkeypatch):
    calls = []

    def trained(name, model, way, seed, split, share):
        calls.append((way, share))
        return replace(run_of(way, seed, 0.7, 0.31), split=split)

    monkeypatch.setattr(compression, "trained", trained)
    book = Book(tmp_path / "runs.jsonl")
    first = book.run("criteo", "deepfm", "tiers as int8", 0, "test")
    assert calls == [("int8", 1.0), ("tiers as int8", 0.31)]
    assert Book(tmp_path / "runs.jsonl").run("criteo", "deepfm", "tiers as int8", 0, "test") == first
    assert len(calls) == 2


def test_a_drop_is_against_fp32_with_the_same_seed():
    plain = [run_of("fp32", 0, 0.70), run_of("fp32", 1, 0.80)]
    found = outcome([run_of("int8", 0, 0.69, 0.3), run_of("int8", 1, 0.81, 0.3)], plain)
    assert found["drop"]["max"] == pytest.approx(0.01)
    assert found["drop"]["min"] == pytest.approx(-0.01)
    assert found["drop"]["mean"] == pytest.approx(0.0)
    assert found["share"] == pytest.approx(0.3)


def test_ways_without_all_seeds_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "trained", lambda *key: run_of(key[2], key[3], 0.7))
    book = Book(tmp_path / "runs.jsonl")
    for way, seed in (("fp32", 0), ("fp32", 1), ("int8", 0), ("int8", 1), ("int4", 0)):
        book.run("criteo", "deepfm", way, seed, "test")
    results = results_of(book, "test", 2)
    assert list(results["criteo"]["deepfm"]) == ["fp32", "int8"]
    assert [row[0] for row in rows_of(results)] == ["criteo deepfm fp32", "criteo deepfm int8"]
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
