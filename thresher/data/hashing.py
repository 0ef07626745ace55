"""Raw values onto table rows by xxh3-64, a column at a time: each distinct value is hashed once.

    row = 1 + xxh3_64(text, seed = xxh3_64(table name)) mod (rows - 1)

``text`` is the UTF-8 value; an integer hashes as its decimal string. Row 0 is kept for a missing value: a null or an
empty string. The table's name salts the hash, so that two tables of equal size do not share collisions. Data sets on
disk and trained tables depend on this mapping: it must never change.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from thresher.data.schema import MISSING_ROW
from thresher.errors import SchemaError


def salt(table: str) -> int:
    """The seed of a table's hash."""
    return xxh3_64_intdigest(table.encode())


def require_ids(kind: pa.DataType, where: str = "") -> None:
    """Checks that values of a type can be ids.

    Raises:
        SchemaError: they cannot: floats for instance, whose text is ambiguous.
    """
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (is_text(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner) or pa.types.is_null(inner)):
        raise SchemaError(f"ids of type {kind}", where=where, fix="give ids as strings or integers")


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def texts(values: pa.Array) -> pa.Array:
    """Values as the strings that hashing and vocabularies know: integers in decimal, empty strings null.

    Args:
        values: strings, integers, booleans (as 0 and 1), a dictionary of those, or nulls.

    Raises:
        SchemaError: values of another type.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return texts(values.cast(kind.value_type))
    if pa.types.is_boolean(kind):
        return texts(values.cast(pa.int8()))
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return values.cast(pa.string())
    require_ids(kind)
    return pc.if_else(pc.equal(values, ""), None, values).cast(pa.large_string())


def hash_texts(distinct: list[str | None], table: str, rows: int) -> NDArray[np.int64]:
    """Rows of ``table`` for each of ``distinct`` values: [n] int64 in 0..rows-1."""
    seed = salt(table)
    digests = np.fromiter(
        (0 if text is None else xxh3_64_intdigest(text.encode(), seed) for text in distinct), np.uint64, len(distinct)
    )
    hashed = 1 + (digests % np.uint64(rows - 1)).astype(np.int64)
    hashed[[text is None for text in distinct]] = MISSING_ROW
    return hashed


def hash_column(values: pa.Array, table: str, rows: int) -> NDArray[np.int64]:
    """Rows of ``table`` for a column of raw ids.

    Args:
        values: [n] strings or integers, nulls allowed.
        table: the table's name, the salt.
        rows: the table's rows, at least 2.

    Returns:
        [n] int64; 0 for a null or an empty string.
    """
    if rows < 2:
        raise SchemaError(f"{rows} row(s) leave none to hash onto", where=f"table '{table}'", fix="give rows >= 2")
    coded = texts_coded(values)
    return hash_texts(coded[1], table, rows)[coded[0]]


def texts_coded(values: pa.Array) -> tuple[NDArray[np.int64], list[str | None]]:
    """A column as positions in its distinct texts: [n] int64, and the texts (null among them where one occurs)."""
    coded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode(null_encoding="encode")
    codes = coded.indices
    distinct: list[str | None] = texts(coded.dictionary).to_pylist()
    if codes.null_count:
        codes = pc.fill_null(codes, len(distinct))
        distinct.append(None)
    return codes.to_numpy(zero_copy_only=False).astype(np.int64), distinct


def digest_column(values: pa.Array) -> pa.Array:
    """[n] strings to [n] int64 that stand for them: their unsalted xxh3-64, as signed integers; missing ones as 0."""
    codes, distinct = texts_coded(values)
    digests = (0 if text is None else xxh3_64_intdigest(text.encode()) for text in distinct)
    return pa.array(np.fromiter(digests, np.uint64, len(distinct)).view(np.int64)[codes])


def mix(counter: NDArray[Any], seed: int | str) -> NDArray[np.uint64]:
    """SplitMix64 of a counter (Steele et al. 2014): [n] integers to [n] independent-looking 64-bit integers."""
    with np.errstate(over="ignore"):
        z = counter.astype(np.uint64) + np.uint64(xxh3_64_intdigest(str(seed).encode()))
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def uniform(counter: NDArray[Any], seed: int | str) -> NDArray[np.float64]:
    """[n] integers to [n] floats uniform in [0, 1), a pure function of counter and seed."""
    return np.asarray((mix(counter, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53, dtype=np.float64)
