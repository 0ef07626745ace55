"""Plain text as windows of tokens."""

import gzip
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from tests.data.raw_rows import gather
from tests.shared_data import shared_dir
from thresher.data.prepare import prepare
from thresher.data.reader import Reader
from thresher.data.recipes.registry import build_recipe
from thresher.data.recipes.text import TEXT, Text
from thresher.errors import ConfigError, DataError

ALL = {"valid": 0.0, "test": 0.0}


def write(folder, content, name="a.txt"):
    path = folder / name
    path.write_bytes(content)
    return path


def windows(recipe, split="train"):
    return [row[TEXT] for row in gather(recipe).rows(split)]


def test_windows_share_the_token_at_their_border(tmp_path):
    recipe = Text(source=write(tmp_path, bytes(range(10))), length=3, **ALL)
    assert windows(recipe) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert [row for _, row in gather(recipe).places["train"]] == [1, 4, 7]


def test_a_tail_is_a_shorter_window_and_a_single_token_is_none(tmp_path):
    path = write(tmp_path, bytes(range(12)))
    assert windows(Text(source=path, length=4, **ALL))[-1] == [8, 9, 10, 11]
    assert windows(Text(source=path, length=10, **ALL)) == [list(range(11)), [10, 11]]
    assert windows(Text(source=path, length=11, **ALL)) == [list(range(12))]
    assert windows(Text(source=path, length=100, **ALL)) == [list(range(12))]


def test_strides_below_the_length_overlap(tmp_path):
    recipe = Text(source=write(tmp_path, bytes(range(9))), length=4, stride=2, **ALL)
    assert windows(recipe) == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8]]


@pytest.mark.parametrize("length", [1, 7, 50])
def test_each_token_is_predicted_once_and_no_window_crosses_a_border(tmp_path, length):
    content = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    rows = gather(Text(source=write(tmp_path, content.tobytes()), length=length, valid=0.1, test=0.2))
    borders = [0, 700, 800, 1000]
    for split, (low, high) in zip(("train", "valid", "test"), pairwise(borders), strict=True):
        predicted = []
        for row, (_, number) in zip(rows.rows(split), rows.places[split], strict=True):
            assert row[TEXT] == content[number - 1 : number - 1 + len(row[TEXT])].tolist()
            predicted += range(number, number + len(row[TEXT]) - 1)
        assert predicted == list(range(low + 1, high))


def test_characters_have_a_vocabulary_of_the_training_part(tmp_path):
    path = write(tmp_path, ("aé\n b" * 20 + "z" * 20).encode())
    recipe = Text(source=path, level="character", length=10, valid=0.0, test=1 / 6)
    assert windows(recipe)[0] == list("aé\n baé\n ba")
    prepared = prepare(recipe, tmp_path / "data")
    assert prepared.schema.table("token").rows == 2 + 5
    batch = next(iter(Reader(prepared, "test", batch_size=1, shuffle=False).sweep()))
    assert set(batch.sparse[TEXT].values().tolist()) == {1}, "unseen characters share row 1"


def test_a_character_may_straddle_blocks_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.data.recipes.text._BLOCK_BYTES", 3)
    text = "äöü€𝄞x" * 5
    recipe = Text(source=write(tmp_path, text.encode()), level="character", length=7, **ALL)
    assert "".join(row[0] + "".join(row[1:-1]) for row in windows(recipe)) == text[:-1]


def test_bytes_index_their_table(tmp_path):
    dataset = prepare(Text(source=write(tmp_path, b"hello world"), length=4, **ALL), tmp_path / "data")
    table = dataset.schema.table("token")
    assert (table.rows, table.ids) == (256, "index")
    (sequence,) = dataset.schema.sequences
    assert sequence.max_length == 5
    batch = next(iter(Reader(dataset, "train", batch_size=3, shuffle=False).sweep()))
    assert bytes(batch.sparse[TEXT].values().tolist()) == b"hello" + b"o wor" + b"rld"


def test_several_files_folders_and_compression(tmp_path):
    write(tmp_path, b"abcd", "a2.txt")
    write(tmp_path, b"efgh", "a10.txt")
    assert [bytes(row) for row in windows(Text(source=tmp_path, length=8, **ALL))] == [b"abcd", b"efgh"]
    packed = write(tmp_path, gzip.compress(b"abcd"), "b.gz")
    assert [bytes(row) for row in windows(Text(source=packed, length=8, **ALL))] == [b"abcd"]


def test_a_long_text_takes_little_memory(tmp_path):
    path = write(tmp_path, bytes(1 << 25))
    recipe = Text(source=path, length=1000, **ALL)
    tracemalloc.start()
    rows = sum(chunk.table.num_rows for chunk in recipe.chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == -(-((1 << 25) - 1) // 1000)
    assert peak < 40 << 20, "the text has 32 MiB, 256 MiB as ids"


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"fewer than two tokens.*longer text"):
        windows(Text(source=write(tmp_path, b"a")))
    with pytest.raises(DataError, match=r"no text in UTF-8: invalid start byte at byte 4.*level=byte"):
        windows(Text(source=write(tmp_path, b"abcd\xff"), level="character"))
    with pytest.raises(DataError, match="is empty"):
        windows(Text(source=write(tmp_path, b"")))
    with pytest.raises(DataError, match="no such file"):
        windows(Text(source=tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match=r"stride 5 is above length 4"):
        build_recipe("text", {"source": "x", "length": 4, "stride": 5})
    with pytest.raises(ConfigError, match="no text to train on"):
        build_recipe("text", {"source": "x", "valid": 0.5, "test": 0.5})
    with pytest.raises(ValidationError):
        Text(source="x", length=0)


def test_tinyshakespeare(tmp_path):
    dataset = prepare(Text(source=shared_dir("text") / "tinyshakespeare.txt", level="character"), tmp_path / "data")
    assert dataset.schema.table("token").rows == 67, "65 characters, missing and unseen"
    assert dataset.manifest.facts["tokens"] == 1_115_394
    batch = next(iter(Reader(dataset, "train", batch_size=4, shuffle=False).sweep()))
    assert batch.sparse[TEXT].lengths().tolist() == [1025] * 4
