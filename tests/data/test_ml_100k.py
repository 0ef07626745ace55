"""The recipe ml-100k on a small wheel of the same layout."""

import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from thresher.data.prepare import prepare
from thresher.data.recipes.base import SPLITS
from thresher.data.recipes.ml_100k import MovieLens100k
from thresher.errors import DataError

USERS = (
    "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "1\t24\tM\ttech\t85711\n2\t53\tF\tx\tT8H\n"
)
ITEMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    '1\tThe "Story\t1995\tAnimation Comedy\n2\tGolden\t1996\tAction\n3\tNone\t\t\n'
)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    ratings = [f"{1 + i % 2}\t{1 + i % 3}\t{1 + i % 5}\t{881250949 + 7 * i % 1000}" for i in range(200)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    with zipfile.ZipFile(path, "w") as archive:
        base = "recbole/dataset_example/ml-100k/ml-100k"
        archive.writestr(f"{base}.inter", "\n".join([header, *ratings, ""]))
        archive.writestr(f"{base}.user", USERS)
        archive.writestr(f"{base}.item", ITEMS)
    return path


def rows(recipe: MovieLens100k) -> dict[int, dict[str, object]]:
    found = {}
    for chunk in recipe.chunks():
        for number, row in zip(chunk.rows.tolist(), chunk.table.to_pylist(), strict=True):
            found[number] = row | {"split": chunk.split}
    return found


def test_rows(wheel: Path) -> None:
    found = rows(MovieLens100k(source=str(wheel)))
    assert sorted(found) == list(range(2, 202))  # line numbers; line 1 is the header
    first = {key: value for key, value in found[2].items() if key not in ("split", "group", "time", "liked")}
    assert first == {
        "user": "1",
        "item": "1",
        "age": "24",
        "gender": "M",
        "occupation": "tech",
        "zip_code": "85711",
        "release_year": "1995",
        "genre": ["Animation", "Comedy"],
    }
    assert (found[2]["group"], found[2]["time"]) == (1, 881250949)
    assert found[4]["genre"] == []
    assert not found[4]["release_year"]
    assert [found[line]["liked"] for line in range(2, 7)] == [0, 0, 0, 1, 1]
    strict = rows(MovieLens100k(source=str(wheel), liked_from=5))
    assert [strict[line]["liked"] for line in range(2, 7)] == [0, 0, 0, 0, 1]


def test_splits(wheel: Path) -> None:
    first, second = (rows(MovieLens100k(source=str(wheel), seed=seed)) for seed in (0, 1))
    assert {row["split"] for row in first.values()} == set(SPLITS)
    assert [row["split"] for row in first.values()] != [row["split"] for row in second.values()]
    by_time = rows(MovieLens100k(source=str(wheel), split="time"))
    newest = [np.array([row["time"] for row in by_time.values() if row["split"] == s]) for s in SPLITS]
    assert newest[0].max() < newest[1].min() <= newest[1].max() < newest[2].min()


def test_prepared(wheel: Path, tmp_path: Path) -> None:
    dataset = prepare(MovieLens100k(source=str(wheel)), tmp_path / "ml", max_bad_share=0.0)
    assert sum(dataset.manifest.facts["rows"].values()) == 200
    assert dataset.schema.table("item").rows == 5
    assert dataset.manifest.facts["missing_share"]["release_year"] == pytest.approx(66 / 200)


def test_a_file_of_another_form(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "")
    with pytest.raises(DataError, match=r"x.whl: 'dataset_example/ml-100k/ml-100k.inter' is not as expected"):
        list(MovieLens100k(source=str(tmp_path / "x.whl")).chunks())


def test_the_table_is_arrow(wheel: Path) -> None:
    chunk = next(MovieLens100k(source=str(wheel)).chunks())
    assert isinstance(chunk.table, pa.Table)
    assert chunk.file.endswith("ml-100k.inter")
