"""Initial weights are a pure function of (seed, table, row, column)."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

from thresher.embeddings.init import BLOCK_ROWS, fill, init_scale, init_tables, initial_rows

ROWS, DIM, SCALE = 2 * BLOCK_ROWS + 77, 10, 0.25
GOLDEN = [[-0.898135781288147, -0.49840736389160156], [-0.12333822250366211, -0.817569375038147]]
WHOLE = initial_rows(3, "bags.user", 0, ROWS, DIM, SCALE)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, ROWS), st.integers(0, ROWS), st.integers(0, DIM - 1), st.integers(1, DIM))
def test_any_rectangle_is_that_part_of_the_whole(row0: int, rows: int, col0: int, cols: int) -> None:
    rows, cols = min(rows, ROWS - row0), min(cols, DIM - col0)
    part = torch.full((rows, cols), float("nan"))
    fill(part, 3, "bags.user", DIM, SCALE, row0, col0)
    assert np.array_equal(part.numpy(), WHOLE[row0 : row0 + rows, col0 : col0 + cols])


def test_seed_and_table_change_everything() -> None:
    for seed, table in ((4, "bags.user"), (3, "bags.item"), (3, "user")):
        other = initial_rows(seed, table, 0, ROWS, DIM, SCALE)
        assert (other == WHOLE).mean() < 1e-3
        assert abs(np.corrcoef(other.ravel(), WHOLE.ravel())[0, 1]) < 0.03


def test_values_are_uniform_on_the_scale_and_rows_differ() -> None:
    assert WHOLE.dtype == np.float32
    assert -SCALE <= WHOLE.min() < -0.999 * SCALE
    assert 0.999 * SCALE < WHOLE.max() < SCALE
    assert abs(WHOLE.mean()) < 0.005
    assert WHOLE.std() == pytest.approx(SCALE / np.sqrt(3), rel=0.01)
    assert len(np.unique(WHOLE, axis=0)) == ROWS


def test_the_numbers_themselves_do_not_change_between_versions() -> None:
    found = initial_rows(0, "t", BLOCK_ROWS - 1, 2, 2, 1.0)
    assert found.tolist() == GOLDEN


def test_scale_defaults_to_that_of_torchrec() -> None:
    assert init_scale(400) == 0.05
    assert init_scale(400, 0.01) == 0.01


def test_tables_of_a_model_are_known_by_their_path() -> None:
    bags = [EmbeddingBagConfig(name="user", num_embeddings=9, embedding_dim=4, feature_names=["u"])]
    sequences = [EmbeddingConfig(name="user", num_embeddings=9, embedding_dim=4, feature_names=["u"])]
    model = torch.nn.ModuleDict({"bags": EmbeddingBagCollection(bags), "sequences": EmbeddingCollection(sequences)})
    init_tables(model, 7)
    for folder, path in (("embedding_bags", "bags.user"), ("embeddings", "sequences.user")):
        weight = model[path.split(".")[0]].get_parameter(f"{folder}.user.weight")
        assert np.array_equal(weight.detach().numpy(), initial_rows(7, path, 0, 9, 4, 1 / 3))


def test_filling_a_large_table_needs_the_memory_of_a_block() -> None:
    weight = torch.empty(200_000, 16)
    tracemalloc.start()
    fill(weight, 0, "t", 16, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < weight.nbytes
