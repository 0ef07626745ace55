"""Taobao ads: positives as given, negatives drawn."""

from pathlib import Path

import pytest

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.recipes.taobao_ad import TaobaoAd
from thresher.errors import DataError


def made(folder: Path, train: str, test: str = "1 11\n") -> Path:
    (folder / "train.txt").write_text(train)
    (folder / "test.txt").write_text(test)
    (folder / "u.user").write_text("".join(f"{u} {' '.join(str(u * 10 + i) for i in range(8))} \n" for u in (1, 2, 3)))
    (folder / "u.item").write_text("".join(f"{i} {i % 3} {i % 2} 1\n" for i in range(10, 20)))
    return folder


def test_the_sample_has_its_published_counts():
    recipe = TaobaoAd(source=shared_dir("taobao_ad"), negatives=1)
    rows = gather(recipe)
    assert recipe.facts() == {"clicks": {"train": 227_108, "test": 54_723}}
    assert rows.counts()["train"] + rows.counts()["valid"] == 2 * 227_108
    assert rows.counts()["test"] == 2 * 54_723
    assert rows.mean("label") == 0.5
    assert rows.bad == []
    pairs = rows.tables["test"].select(["user", "item"]).group_by(["user", "item"]).aggregate([]).num_rows
    assert pairs > 2 * 54_723 * 0.99  # negatives do not repeat the positives
    for field in ("cms_segid", "cate_id"):
        assert rows.tables["train"].column(field).null_count == 0


@pytest.mark.parametrize("sampling", ["popularity", "uniform"])
def test_negatives_are_items_the_user_never_clicked(tmp_path, sampling):
    folder = made(tmp_path, "1 10 12\n2 13 14\n3 15 16 17 18\n")
    rows = gather(TaobaoAd(source=folder, negatives=3, sampling=sampling, valid=0.0))
    clicked = {"1": {"10", "12", "11"}, "2": {"13", "14"}, "3": {"15", "16", "17", "18"}}
    everything = rows.rows("train") + rows.rows("test")
    assert len(everything) == (8 + 1) * 4
    for row in everything:
        assert (row["item"] in clicked[row["user"]]) == row["label"]
    assert {row["item"] for row in everything if not row["label"]} <= set().union(*clicked.values())


def test_draws_depend_on_the_seed_only(tmp_path):
    folder = made(tmp_path, "1 10 12\n2 13 14\n3 15 16 17 18\n" * 5)
    first, again, other = (gather(TaobaoAd(source=folder, seed=seed)).tables for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_click_and_its_negatives_share_line_and_split(tmp_path):
    folder = made(tmp_path, "1 10 12\n2 13 14\n\n3 15 16 17 18\n" * 10)
    rows = gather(TaobaoAd(source=folder, negatives=2, valid=0.3))
    assert 0 < rows.counts()["valid"] < rows.counts()["train"]
    for split in ("train", "valid"):
        for row, (file, number) in zip(rows.rows(split), rows.places[split], strict=True):
            assert (file, row["user"]) == ("train.txt", {1: "1", 2: "2", 0: "3"}[number % 4])
        assert sum(row["label"] for row in rows.rows(split)) * 3 == rows.counts()[split]


def test_a_user_who_clicked_everything_gets_no_negatives(tmp_path):
    folder = made(tmp_path, "1 10\n", "1 11\n")
    assert gather(TaobaoAd(source=folder, valid=0.0)).counts() == {"train": 1, "test": 1}


def test_fields_are_joined_and_unknown_ids_have_none(tmp_path):
    folder = made(tmp_path, "1 10\n9 99\n")
    rows = gather(TaobaoAd(source=folder, negatives=1, valid=0.0)).rows()
    known = next(row for row in rows if row["user"] == "1" and row["item"] == "10")
    assert (known["cms_segid"], known["new_user_class_level"], known["brand"]) == ("10", "17", "0")
    unknown = next(row for row in rows if row["user"] == "9" and row["label"])
    assert unknown["cms_segid"] is unknown["price"] is None


def test_malformed_lines_are_set_aside(tmp_path):
    folder = made(tmp_path, "1 10\n")
    (folder / "train.txt").write_bytes(b"1 10\n2 \xff\n3 12\n")
    (folder / "u.item").write_text("10 1 1 1\n11 1 1\n")
    rows = gather(TaobaoAd(source=folder, valid=0.0))
    assert [(Path(row.file).name, row.row) for row in rows.bad] == [("train.txt", 2), ("u.item", 2)]


def test_missing_and_empty_files_are_named(tmp_path):
    made(tmp_path, "1\n2\n")
    with pytest.raises(DataError, match=r"train.txt: holds no clicks"):
        gather(TaobaoAd(source=tmp_path))
    (tmp_path / "u.user").unlink()
    with pytest.raises(DataError, match=r"no profiles \(u.user\)"):
        gather(TaobaoAd(source=tmp_path))


def test_one_folder_is_the_source(tmp_path):
    with pytest.raises(DataError, match=r"2 sources given. Give the folder"):
        gather(TaobaoAd(source=(tmp_path, tmp_path)))
