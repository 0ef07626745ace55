"""libsvm text: indices with their values as weights."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file

from tests.data.raw_rows import gather
from thresher.data.recipes.libsvm import LibSvm
from thresher.errors import DataError

ALL = {"valid": 0.0, "test": 0.0}


def write(folder: Path, text: str) -> Path:
    path = folder / "x.svm"
    path.write_text(text)
    return path


def test_indices_values_labels_and_comments(tmp_path):
    path = write(tmp_path, "+1 1:0.5 3:1 # a comment\n# only a comment\n\n-1 2:1e-3\n1 7:.5 2:+3.\n0\n")
    recipe = LibSvm(source=path, **ALL)
    rows = gather(recipe)
    assert [(row["label"], row["index"], row["value"]) for row in rows.rows()] == [
        (1.0, [1, 3], [0.5, 1.0]),
        (0.0, [2], [0.001]),
        (1.0, [7, 2], [0.5, 3.0]),
        (0.0, [], []),
    ]
    assert [number for _, number in rows.places["train"]] == [1, 4, 5, 6]
    assert rows.bad == []
    assert recipe.data_schema().table("index").rows == 8


def test_what_scikit_learn_writes_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.random((50, 20)) * (rng.random((50, 20)) < 0.3)
    y = rng.integers(0, 2, 50)
    dump_svmlight_file(x, y, str(tmp_path / "x.svm"), zero_based=False)
    rows = gather(LibSvm(source=tmp_path, features=21, **ALL)).rows()
    for row, values, label in zip(rows, x, y, strict=True):
        assert row["index"] == (np.flatnonzero(values) + 1).tolist()
        assert np.allclose(row["value"], values[values > 0], rtol=1e-12)
        assert row["label"] == label


def test_words_that_do_not_fit_are_set_aside(tmp_path):
    path = write(tmp_path, "1 1:1\n1 a:3\n0 3:1:2\nx 1:2\n1 5: 2:1\n1 -1:2\n1 2:nan\n1 1.5:2\n")
    rows = gather(LibSvm(source=path, **ALL))
    assert rows.total == 1
    assert [row.row for row in rows.bad] == [2, 3, 4, 5, 6, 7, 8]
    assert rows.bad[0].reason == "line: 'a:3' is no label, index:value or qid:N in its place"
    assert rows.bad[3].reason.startswith("line: '5:'")


def test_indices_out_of_range_are_set_aside(tmp_path):
    rows = gather(LibSvm(source=write(tmp_path, "1 4:1\n1 5:1\n"), features=5, **ALL))
    assert [(row.row, row.reason) for row in rows.bad] == [
        (2, "feature 'index' of table 'index': id 5 is outside 0..4")
    ]


def test_other_labels_need_a_threshold(tmp_path):
    path = write(tmp_path, "1 1:1\n2 1:1\n")
    assert [row.reason for row in gather(LibSvm(source=path, **ALL)).bad] == ["feature 'label': 2.0 is not 0 or 1"]
    rows = gather(LibSvm(source=path, positive_above=1.5, **ALL))
    assert [row["label"] for row in rows.rows()] == [0, 1]
    assert [row["label"] for row in gather(LibSvm(source=path, task="regression", **ALL)).rows()] == [1.0, 2.0]


def test_query_ids_become_groups(tmp_path):
    path = write(tmp_path, "3 qid:1 1:0.5\n1 qid:1 2:1\n1 2:1\n0 qid:2\n1\n")
    rows = gather(LibSvm(source=path, task="regression", **ALL))
    assert [(row["group"], row["index"]) for row in rows.rows()] == [(1, [1]), (1, [2]), (2, [])]
    assert [(row.row, row.reason) for row in rows.bad] == [
        (3, "line: '2:1' is no label, index:value or qid:N in its place"),
        (5, "line: qid is missing"),
    ]


def test_rows_are_held_out(tmp_path):
    rows = gather(LibSvm(source=write(tmp_path, "1 1:1\n" * 1000)))
    assert set(rows.counts()) == {"train", "valid", "test"}
    assert abs(rows.counts()["train"] - 800) < 50


def test_a_file_of_another_format_is_refused(tmp_path):
    with pytest.raises(DataError, match="no line is 'label index:value"):
        gather(LibSvm(source=write(tmp_path, "a,b,c\n1,2,3\n")))
