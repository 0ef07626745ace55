"""Random bits are the numbers their formula says, whatever part of a table asks for them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.embeddings.rows.generator import (
    DEMOTED,
    FIRST_STATE,
    GOLDEN32,
    GOLDEN64,
    SECOND_STATE,
    STEP64,
    STREAM32,
    WEIGHTS,
    random_bits,
    row_keys,
    table_key,
)

WORD, HALF = (1 << 64) - 1, (1 << 32) - 1
KEY = table_key(7, "bags.user")


def literally(key: int, row: int, step: int, stream: int, column: int) -> int:
    """The formula in whole numbers of any size."""
    z = ((key ^ (row * GOLDEN64 & WORD)) + step * STEP64) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    z ^= z >> 31
    x = (((z & HALF) + column * GOLDEN32) & HALF) ^ (((z >> 32) + stream * STREAM32) & HALF)
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & HALF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & HALF
    return x ^ (x >> 16)


def drawn(rows: torch.Tensor, step: int, columns: int, stream: int = WEIGHTS, col0: int = 0) -> torch.Tensor:
    return random_bits(row_keys(KEY, rows, step), columns, stream, col0)


@settings(max_examples=200)
@given(
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(0, 1 << 40),
    st.sampled_from([WEIGHTS, FIRST_STATE, SECOND_STATE, DEMOTED, DEMOTED + 2]),
    st.integers(0, 1 << 20),
)
def test_bits_are_those_of_the_formula(key: int, row: int, step: int, stream: int, column: int) -> None:
    keys = row_keys(key, torch.tensor([row]), step)
    expected = literally(key & WORD, row & WORD, step, stream, column)
    assert random_bits(keys, 1, stream, column).item() == expected


def test_the_numbers_themselves_do_not_change_between_versions() -> None:
    assert KEY == -5942147867455656274
    assert drawn(torch.tensor([3]), 5, 3).tolist() == [[3802907861, 1123585197, 373372585]]


def test_a_shard_draws_what_the_whole_table_draws() -> None:
    whole = drawn(torch.arange(20), 4, 12)
    assert torch.equal(drawn(torch.tensor([17, 2]), 4, 5, col0=6), whole[[17, 2], 6:11])


def test_bits_are_uniform_and_differ_by_row_step_stream_and_column() -> None:
    rows = torch.arange(2000)
    first = drawn(rows, 1, 64)
    assert len(first.unique()) > 0.9999 * first.numel()
    shares = torch.stack([(first >> bit & 1).double().mean() for bit in range(32)])
    assert (shares - 0.5).abs().max() < 4 * 0.5 / first.numel() ** 0.5
    for other in (drawn(rows, 2, 64), drawn(rows, 1, 64, FIRST_STATE), drawn(rows + 1, 1, 64)):
        flipped = torch.stack([((first ^ other) >> bit & 1).double().mean() for bit in range(32)])
        assert (flipped - 0.5).abs().max() < 4 * 0.5 / first.numel() ** 0.5


def test_keys_depend_on_seed_and_table() -> None:
    assert len({table_key(seed, name) for seed in (0, 1) for name in ("a", "b")}) == 4
