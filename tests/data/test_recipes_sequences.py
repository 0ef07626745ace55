"""Leave-one-out sequences, and the text format 'user item item ...'."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.recipes.sequences import Interactions, leave_one_out
from thresher.data.recipes.user_item import UserItem
from thresher.errors import DataError


def write(folder: Path, text: str | bytes, name: str = "x.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pairs(rows, split: str) -> list[tuple[list[str], str]]:
    return [(row["history"], row["item"]) for row in rows.rows(split)]


def test_the_last_items_are_held_out(tmp_path):
    recipe = UserItem(source=write(tmp_path, "u a b c d e\nv a b c\nw a b\nx a\ny\n"))
    rows = gather(recipe)
    assert pairs(rows, "train") == [(["a", "b"], "c")]
    assert pairs(rows, "valid") == [(["a", "b", "c"], "d"), (["a"], "b")]
    assert pairs(rows, "test") == [(["a", "b", "c", "d"], "e"), (["a", "b"], "c"), (["a"], "b")]
    assert [row["group"] for row in rows.rows("test")] == ["u", "v", "w"]
    assert recipe.facts() == {"users_left_out": 1}


def brute_force(users, items, times) -> dict[str, list[tuple]]:
    out = {"train": [], "valid": [], "test": []}
    for user in dict.fromkeys(users):
        mine = sorted((times[i], i) for i in range(len(users)) if users[i] == user)
        sequence = [items[i] for _, i in mine]
        for back, split in enumerate(("test", "valid", "train"), start=1):
            if len(sequence) > back:
                at = len(sequence) - back
                out[split].append((user, sequence[:at], sequence[at], mine[at][1] + 1))
    return out


def test_leave_one_out_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 60))
        users, items, times = (rng.integers(0, high, n).tolist() for high in (8, 20, 10))
        side = {"kind": pa.array([item % 3 for item in items])}
        log = Interactions(("f",), np.arange(1, n + 1), pa.array(users), pa.array(items), np.array(times), side)
        found = {"train": [], "valid": [], "test": []}
        for chunk in leave_one_out(log):
            for row, number in zip(chunk.table.to_pylist(), chunk.rows.tolist(), strict=True):
                found[chunk.split].append((row["user"], row["history"], row["item"], number))
                assert row["time"] == times[number - 1]
                assert row["kind"] == row["item"] % 3
                assert row["history.kind"] == [item % 3 for item in row["history"]]
        assert found == brute_force(users, items, times)


def test_a_user_on_several_lines_and_in_several_files_is_one_sequence(tmp_path):
    write(tmp_path, "u c\n", "test.txt")
    write(tmp_path, "u b\n", "valid.txt")
    write(tmp_path, "v q r\nu a\nv s\n", "train.txt")
    rows = gather(UserItem(source=tmp_path))
    assert pairs(rows, "test") == [(["q", "r"], "s"), (["a", "b"], "c")]
    assert rows.places["test"] == [("train.txt", 3), ("test.txt", 1)]
    assert rows.places["valid"] == [("train.txt", 1), ("valid.txt", 1)]


def test_histories_may_be_cut_and_schema_says_how(tmp_path):
    schema = UserItem(source=write(tmp_path, "u a b c d e\n"), max_length=2).data_schema()
    assert schema.sequences[0].max_length == 2
    assert schema.id_tables == {"user": "user", "item": "item", "history": "item"}


@pytest.mark.parametrize(("data", "users", "items"), [("taobao_seq", 47_703, 637_165), ("gowalla", 29_858, 1_027_370)])
def test_real_sequences_lose_nothing(data, users, items):
    rows = gather(UserItem(source=shared_dir(data)))
    assert rows.bad == []
    assert rows.counts()["test"] == users
    histories = rows.tables["test"].column("history")
    assert sum(len(chunk.flatten()) for chunk in histories.chunks) + users == items


def test_malformed_lines_are_set_aside(tmp_path):
    path = write(tmp_path, b"u a b c\nv \xff d\n\nw a b\n")
    rows = gather(UserItem(source=path))
    assert [(row.file, row.row) for row in rows.bad] == [(str(path), 2)]
    assert rows.counts()["test"] == 2


def test_files_without_interactions_are_refused(tmp_path):
    with pytest.raises(DataError, match="no line holds a user and an item"):
        gather(UserItem(source=write(tmp_path, "u\nv\n")))
    with pytest.raises(DataError, match="is empty"):
        gather(UserItem(source=write(tmp_path, "")))
