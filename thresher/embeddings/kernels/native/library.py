"""The compiled kernels: found, checked to be those of these sources, called through ctypes (which frees the GIL)."""

import ctypes
import warnings
from ctypes import c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from thresher.embeddings.kernels.native.sources import FOLDER, LIBRARY, digest, sources
from thresher.errors import VersionError

ABI = 1
TIERS = 6
OK, BAD_BAGS, BAD_GRADIENT, OUT_OF_MEMORY = range(4)
ISA_NAMES = ("scalar", "AVX2", "AVX-512")
_REBUILD = "build them anew: 'make setup' in a checkout, 'pip install --force-reinstall --no-deps thresher' otherwise"
_BUILD = "install a C++17 compiler (g++ or clang++) and " + _REBUILD


class TableStruct(ctypes.Structure):
    """``Table`` of abi.h."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "dim", "full_dim")),
        ("weights", c_void_p),
        ("scalar", c_void_p),
        ("vectors", c_void_p * 2),
        *((name, c_void_p) for name in ("desc", "stat", "count")),
        ("slabs", c_void_p * TIERS),
        ("free", c_void_p * TIERS),
        *((name, c_int64 * TIERS) for name in ("slots", "record_bytes", "state_offset")),
        ("identity", c_void_p),
        ("row0", c_int64),
        ("col0", c_int64),
        ("init_key", c_uint64 * 2),
        ("round_key", c_uint64),
        ("step", c_uint64),
        ("init_scale", c_float),
        *((name, c_int32) for name in ("entry", "n_vectors", "has_scalar")),
    )


class BagsStruct(ctypes.Structure):
    """``Bags`` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("ids", "offsets", "weights", "tables", "first_bag", "start", "stride")),
        ("n", c_int64),
        *((name, c_int32) for name in ("features", "wide_ids", "pooling", "n_tables")),
    )


class SortedStruct(ctypes.Structure):
    """``Sorted`` of abi.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("first", "unique", "rows", "segments", "payload", "bag_of")),
        ("by_position", c_int32),
    )


class ErrorStruct(ctypes.Structure):
    """``Error`` of abi.h."""

    _fields_ = (("row", c_int64), ("fault", c_int32), ("table", c_int32))


class Library:
    """The library's functions.

    Args:
        path: of the library; its sources, where they are installed, beside it.

    Attributes:
        functions: by name; arguments are structures by reference, addresses and numbers.

    Raises:
        VersionError: it was built from other sources, or is no library for this machine.
    """

    def __init__(self, path: Path = FOLDER / LIBRARY) -> None:
        try:
            self.functions = ctypes.CDLL(str(path))
            self.functions.th_sources.restype = c_char_p
            built, abi = self.functions.th_sources().decode(), self.functions.th_abi()
        except (OSError, AttributeError) as error:
            raise VersionError(f"the compiled kernels do not load ({error})", where=str(path), fix=_REBUILD) from error
        if abi != ABI or (sources(path.parent) and built != digest(path.parent)):
            raise VersionError("the compiled kernels are not those of these sources", where=str(path), fix=_REBUILD)
        self._declare()

    def _declare(self) -> None:
        functions = self.functions
        functions.th_sort.argtypes = (c_void_p, c_void_p, c_void_p, c_int32)
        functions.th_lookup.argtypes = (c_void_p, c_void_p, c_void_p, c_int32, c_int32)
        functions.th_weight_gradient.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int32)
        functions.th_read.argtypes = (c_void_p, c_void_p, c_int64, c_void_p, c_int32)
        functions.th_row_sums.argtypes = (c_void_p,)
        functions.th_update.argtypes = (c_void_p, c_void_p, c_void_p)
        functions.th_write.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64)
        functions.th_histogram.argtypes, functions.th_histogram.restype = (c_void_p, c_float, c_void_p), None
        functions.th_demote.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64)
        functions.th_demote.restype = c_int64
        functions.th_compact.argtypes, functions.th_compact.restype = (c_void_p, c_int32), None
        functions.th_row_sums.argtypes = (c_void_p,)
        functions.th_update.argtypes = (c_void_p, c_void_p, c_void_p)
        functions.th_write.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64)
        functions.th_histogram.argtypes, functions.th_histogram.restype = (c_void_p, c_float, c_void_p), None
        functions.th_demote.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64)
        functions.th_demote.restype = c_int64
        functions.th_compact.argtypes, functions.th_compact.restype = (c_void_p, c_int32), None
        for name in ("th_map_find", "th_map_put", "th_map_erase"):
            function = getattr(functions, name)
            function.argtypes, function.restype = (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64), c_int64

        for name in ("th_touch_read", "th_touch_write"):
            function = getattr(functions, name)
            function.argtypes, function.restype = (c_void_p, c_int64, c_void_p, c_int64), c_int64

    @property
    def isa(self) -> int:
        """What instructions are used: 2 for AVX-512, 1 for AVX2, 0 for neither."""
        return int(self.functions.th_isa())

    def set_isa(self, level: int) -> int:
        """Uses at most these instructions; returns what is used. For all that use this library."""
        return int(self.functions.th_set_isa(level))

    def map_call(self, name: str, *arguments: int) -> int:
        """Calls a function of id_map.cpp: addresses of keys, numbers; slots; addresses of ids, values; how many."""
        return int(getattr(self.functions, name)(*arguments))

    def touch_read(self, table: int, row_bytes: int, rows: int, n: int) -> int:
        """Reads ``n`` rows of a table; ``table`` and ``rows`` (int64) are addresses. What a lookup cannot undercut."""
        return int(self.functions.th_touch_read(table, row_bytes, rows, n))

    def touch_write(self, table: int, row_bytes: int, rows: int, n: int) -> int:
        """As :meth:`touch_read`, and writes them back."""
        return int(self.functions.th_touch_write(table, row_bytes, rows, n))


@cache
def load() -> Library | None:
    """The library; None, after one warning, where none was built.

    Raises:
        VersionError: as :class:`Library`.
    """
    if (FOLDER / LIBRARY).exists():
        return Library()
    warnings.warn(
        "the compiled kernels were not built, tables are looked up and updated many times slower; " + _BUILD,
        stacklevel=2,
    )
    return None


def require() -> Library:
    """The library.

    Raises:
        VersionError: there is none, or as :class:`Library`.
    """
    if not (FOLDER / LIBRARY).exists():
        raise VersionError("the compiled kernels were not built", where=str(FOLDER), fix=_BUILD)
    return Library()


def status() -> str:
    """One line about the compiled kernels, for people."""
    if not (FOLDER / LIBRARY).exists():
        return "not built, a slow reference does their work; " + _BUILD
    try:
        return f"compiled, {ISA_NAMES[Library().isa]}"
    except VersionError as error:
        return f"{error.what}; {error.fix}"
