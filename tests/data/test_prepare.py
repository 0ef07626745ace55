"""Preparation as a whole: what stands in the folder, what is refused, and that it is all or nothing."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from thresher.data.dataset import Dataset
from thresher.data.facts import DistinctIds
from thresher.data.prepare import Progress, prepare
from thresher.data.quarantine import BadRow
from thresher.data.recipes.base import (
    SPLITS,
    Chunk,
    Recipe,
    by_threshold,
    divide,
    random_split,
    time_cuts,
    whole,
)
from thresher.data.recipes.registry import build_recipe, recipes
from thresher.data.schema import DenseFeature, Label, Schema, SparseFeature, Table
from thresher.data.vocabulary import Vocabulary
from thresher.errors import BadBatch, ConfigError, DataError
from thresher.settings import Settings


class Toy(Recipe):
    """Rows 0..rows-1 of one source, in chunks; every ``bad_every``-th has a label of 9, counted from row number 1."""

    recipe: ClassVar[str] = "toy"
    summary: ClassVar[str] = "for tests"

    rows: int = 100
    chunk: int = 30
    bad_every: int = 1000
    fail_at: int = -1
    held: int = 60
    place: str = Field(default="here", exclude=True)
    source: str = Field(default="", exclude=True)

    def data_schema(self) -> Schema:
        return Schema(
            name="toy",
            tables=(Table(name="word", rows=50, ids="vocabulary"), Table(name="kind", rows=20)),
            features=(
                SparseFeature(name="word", table="word"),
                SparseFeature(name="kind", table="kind"),
                DenseFeature(name="x", transform="standard"),
                Label(name="y"),
            ),
        )

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, self.rows, self.chunk):
            if start == self.fail_at:
                raise RuntimeError("killed")
            row = np.arange(start, min(start + self.chunk, self.rows))
            label = np.where((row + 1) % self.bad_every == 0, 9, row % 2)
            words = [None if r % 10 == 0 else f"w{r % 7}{'h' if r >= 80 else ''}" for r in row.tolist()]
            table = pa.table({"word": words, "kind": row % 3, "x": row.astype(float), "y": label})
            unread = (BadRow("toy.txt", self.rows + 1, "line: has 2 columns, not 4", "a b"),) if start == 0 else ()
            chunk = whole("train", table, "toy.txt", start + 1, unread if self.bad_every < 1000 else ())
            yield from divide(chunk, by_threshold(row, self.held, self.held + 20))

    def inputs(self) -> tuple[Path, ...]:
        return (Path(self.source),) if self.source else ()


def rows_of(dataset: Dataset, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in dataset.split(split).paths)


def test_what_stands_in_the_folder(tmp_path: Path) -> None:
    seen: list[Progress] = []
    dataset = prepare(Toy(), tmp_path / "a" / "toy", progress=seen.append)
    assert [dataset.split(name).rows for name in SPLITS] == [60, 20, 20]
    assert [p.rows for p in seen if p.phase == "vocabulary"][-1] == 100
    assert [p.rows for p in seen if p.phase == "write"][-1] == 100
    assert not (tmp_path / "a" / "toy" / "quarantine.jsonl").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["toy"]
    vocabulary = Vocabulary.load(tmp_path / "a" / "toy" / "vocabulary" / "word.parquet")
    assert dataset.schema.table("word").rows == vocabulary.rows == 9
    # the vocabulary knows the training split alone: words of rows 80..99 end in h and are unseen
    test = rows_of(dataset, "test")
    assert set(test["word"].to_pylist()) == {0, 1}
    # so do mean and deviation: rows 0..59
    x = np.arange(60.0)
    assert rows_of(dataset, "valid")["x"].to_pylist() == pytest.approx(
        ((np.arange(60, 80) - x.mean()) / x.std()).tolist()
    )


def test_facts(tmp_path: Path) -> None:
    facts = prepare(Toy(), tmp_path / "toy").manifest.facts
    assert facts["rows"] == {"train": 60, "valid": 20, "test": 20}
    assert facts["distinct_ids"] == {"word": 9, "kind": 3}
    assert facts["missing_share"] == {"word": 0.1, "kind": 0.0, "x": 0.0}
    assert facts["label_mean"] == {"y": {"train": 0.5, "valid": 0.5, "test": 0.5}}
    assert facts["bad_rows"] == 0
    assert facts["moments"]["x"]["mean"] == 29.5
    assert facts["seconds"] >= 0


def test_bad_rows_are_quarantined_with_their_place(tmp_path: Path) -> None:
    dataset = prepare(Toy(bad_every=25), tmp_path / "toy", max_bad_share=0.1)
    written = [json.loads(line) for line in (tmp_path / "toy" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in written) == [25, 50, 75, 100, 101]
    assert {row["file"] for row in written} == {"toy.txt"}
    by_row = {row["row"]: row for row in written}
    assert by_row[25]["reason"] == "feature 'y': 9 is not 0 or 1"
    assert json.loads(by_row[25]["raw"]) == {"word": "w3", "kind": 0, "x": 24.0, "y": 9}
    assert by_row[101] == {"file": "toy.txt", "row": 101, "reason": "line: has 2 columns, not 4", "raw": "a b"}
    assert [dataset.split(name).rows for name in SPLITS] == [58, 19, 19]
    assert dataset.manifest.facts["bad_rows"] == 5
    assert dataset.manifest.facts["bad_by_place"] == {"line": 1, "feature 'y'": 4}
    x = np.array([r for r in range(60) if r not in (24, 49)], float)
    assert dataset.manifest.facts["moments"]["x"]["mean"] == pytest.approx(x.mean())


def test_too_many_bad_rows(tmp_path: Path) -> None:
    with pytest.raises(BadBatch) as error:
        prepare(Toy(bad_every=25), tmp_path / "toy", max_bad_share=0.049)
    assert error.value.message == (
        "BadBatch: toy.txt, row 101: line: has 2 columns, not 4; 5 of 101 rows are bad, allowed is a share of 0.049. "
        f"Mend the rows listed in {tmp_path / 'toy.partial' / 'quarantine.jsonl'}, or raise max_bad_share"
    )
    assert not (tmp_path / "toy").exists()


def test_many_bad_rows_stop_early(tmp_path: Path) -> None:
    with pytest.raises(BadBatch, match="of 10001 rows are bad"):
        prepare(Toy(rows=10**9, chunk=1000, held=10**9, bad_every=50, fail_at=11_000), tmp_path / "toy")
    assert (tmp_path / "toy.partial" / "quarantine.jsonl").exists()


def test_a_finished_folder_is_opened(tmp_path: Path) -> None:
    prepare(Toy(), tmp_path / "toy")
    seen: list[Progress] = []
    again = prepare(Toy(place="elsewhere"), tmp_path / "toy", progress=seen.append)
    assert not seen
    assert again.split("train").rows == 60


def test_other_options_are_refused_unless_overwritten(tmp_path: Path) -> None:
    prepare(Toy(), tmp_path / "toy")
    with pytest.raises(ConfigError, match=r"toy: holds another data set: option rows=100, not 50. Give another folder"):
        prepare(Toy(rows=50), tmp_path / "toy")
    assert prepare(Toy(rows=50), tmp_path / "toy", overwrite=True).split("train").rows == 50
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]
    with pytest.raises(ConfigError, match="holds another data set: recipe 'toy', not 'synthetic'"):
        prepare(build_recipe("synthetic", {}), tmp_path / "toy")


def test_changed_inputs_are_noticed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("one")
    prepare(Toy(source=str(source)), tmp_path / "toy")
    prepare(Toy(source=str(source)), tmp_path / "toy")
    source.write_text("two")
    with pytest.raises(ConfigError, match="its input files have changed since"):
        prepare(Toy(source=str(source)), tmp_path / "toy")
    source.unlink()
    with pytest.raises(DataError, match="source: cannot be read: No such file"):
        prepare(Toy(source=str(source)), tmp_path / "toy")


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"toy: exists and is no data set. Give a new folder"):
            prepare(Toy(), tmp_path / "toy", overwrite=overwrite)
    assert (tmp_path / "toy" / "thesis.tex").read_text() == "years"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    assert prepare(Toy(), tmp_path / "toy").split("train").rows == 60


def test_a_killed_preparation_leaves_nothing_finished_and_is_repeated(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        prepare(Toy(fail_at=60), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()
    assert prepare(Toy(), tmp_path / "toy").split("test").rows == 20
    assert not (tmp_path / "toy.partial").exists()


def test_a_failed_overwrite_keeps_the_old_data(tmp_path: Path) -> None:
    prepare(Toy(), tmp_path / "toy")
    with pytest.raises(RuntimeError, match="killed"):
        prepare(Toy(fail_at=60), tmp_path / "toy", overwrite=True)
    assert Dataset.open(tmp_path / "toy").split("train").rows == 60


def test_two_at_once(tmp_path: Path) -> None:
    (tmp_path / "toy.partial").mkdir()
    descriptor = os.open(tmp_path / "toy.partial", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match=r"toy.partial: another process writes here. Wait for it, or end it"):
        prepare(Toy(), tmp_path / "toy")
    os.close(descriptor)
    prepare(Toy(), tmp_path / "toy")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be created: .*Give a folder you may write"):
        prepare(Toy(), tmp_path / "file" / "toy")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"recipe 'toy': the recipe yields no rows. Check its source"):
        prepare(Toy(rows=0), tmp_path / "toy")


def test_chunking_does_not_matter(tmp_path: Path) -> None:
    first, second = (prepare(Toy(chunk=size), tmp_path / str(size)) for size in (30, 7))
    for split in SPLITS:
        assert rows_of(first, split).drop(["x"]) == rows_of(second, split).drop(["x"])
        assert np.allclose(rows_of(first, split)["x"].to_numpy(), rows_of(second, split)["x"].to_numpy())


@given(st.integers(0, 2**50), st.integers(0, 100), st.floats(0, 0.4), st.floats(0, 0.4))
def test_random_splits_go_by_row_number(first: int, seed: int, valid: float, test: float) -> None:
    index = np.arange(first, first + 50)
    which = random_split(index, valid, test, seed)
    assert which.tolist() == [int(random_split(index[i : i + 1], valid, test, seed)[0]) for i in range(50)]


def test_random_splits_have_their_shares() -> None:
    for seed in (0, 1):
        shares = np.bincount(random_split(np.arange(100_000), 0.1, 0.2, seed)) / 100_000
        assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.005)
    assert (random_split(np.arange(1000), 0, 0, 0) == 0).all()


def test_time_cuts_hold_out_the_newest() -> None:
    time = np.random.default_rng(0).permutation(100)
    which = by_threshold(time, *time_cuts(time, 0.1, 0.2))
    assert np.bincount(which).tolist() == [70, 10, 20]
    assert time[which == 0].max() < time[which == 1].min() <= time[which == 1].max() < time[which == 2].min()


def test_dividing_keeps_row_numbers_and_bad_rows() -> None:
    bad = (BadRow("f", 3, "r", "raw"),)
    chunk = whole("train", pa.table({"a": [10, 11, 12]}), "f", 5, bad)
    parts = list(divide(chunk, np.array([2, 0, 2], np.uint8)))
    assert [(p.split, p.table["a"].to_pylist(), p.rows.tolist()) for p in parts] == [
        ("train", [11], [6]),
        ("test", [10, 12], [5, 7]),
    ]
    assert [p.bad for p in parts] == [bad, ()]
    alone = list(divide(whole("train", pa.table({"a": pa.array([], pa.int64())}), "f", 1, bad), np.zeros(0, np.uint8)))
    assert [p.bad for p in alone] == [bad]


def test_distinct_ids_beyond_the_exact_range() -> None:
    counter = DistinctIds(1 << 40)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1 << 40, 300_000)
    for part in np.split(ids, 3):
        counter.add(part)
        counter.add(part)
    assert counter.count() == pytest.approx(len(np.unique(ids)), rel=0.01)


def test_unknown_recipe_and_option() -> None:
    with pytest.raises(ConfigError, match=r"options: no recipe 'synthetics'. Did you mean 'synthetic'\?"):
        build_recipe("synthetics", {})
    with pytest.raises(ConfigError, match=r"x.yaml of recipe 'synthetic': row: unknown key. Did you mean 'rows'\?"):
        build_recipe("synthetic", {"row": 1}, "x.yaml")
    with pytest.raises(ConfigError, match="rows: must be at least 10, got 0"):
        build_recipe("synthetic", {"rows": 0})


def test_every_recipe_has_a_name_a_summary_and_documented_options() -> None:
    for name, kind in recipes().items():
        assert name == kind.recipe
        assert 0 < len(kind.summary) <= 120
        documented = " ".join(part.__doc__ or "" for part in kind.__mro__ if issubclass(part, Settings))
        missing = [field for field in kind.model_fields if field not in documented]
        assert not missing, f"{name}: {missing} are not documented"
