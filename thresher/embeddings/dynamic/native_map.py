"""An :class:`IdMap` in compiled code: open addressing with linear probing, in arrays of this side."""

from collections.abc import Callable

import numpy as np

from thresher.embeddings.dynamic.id_map import ABSENT, IdMap, Ids
from thresher.embeddings.kernels.native.library import Library, load

FIRST_SLOTS = 64
FULLEST = 0.5
"""Share of slots in use above which a map doubles."""


class NativeMap:
    """See :class:`IdMap`. ``keys`` and ``numbers`` are [slots]; a number of -1 marks a slot as empty."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._size = 0
        self._reserve(FIRST_SLOTS)

    def __len__(self) -> int:
        return self._size

    def find(self, ids: Ids) -> Ids:
        """See :class:`IdMap`."""
        ids = np.ascontiguousarray(ids)
        found = np.empty_like(ids)
        self._call("th_map_find", ids, found)
        return found

    def put(self, ids: Ids, numbers: Ids) -> None:
        """See :class:`IdMap`."""
        wanted = len(self._keys)
        while self._size + len(ids) > FULLEST * wanted:
            wanted *= 2
        if wanted > len(self._keys):
            old_ids, old_numbers = self._entries()
            self._reserve(wanted)
            self._size = self._call("th_map_put", old_ids, old_numbers)
        ids, numbers = np.ascontiguousarray(ids), np.ascontiguousarray(numbers, np.int64)
        self._size += self._call("th_map_put", ids, numbers)

    def erase(self, ids: Ids) -> None:
        """See :class:`IdMap`."""
        ids = np.ascontiguousarray(ids)
        self._size -= self._call("th_map_erase", ids, ids)

    def items(self) -> tuple[Ids, Ids]:
        """See :class:`IdMap`."""
        ids, numbers = self._entries()
        order = np.argsort(ids)
        return ids[order], numbers[order]

    def _entries(self) -> tuple[Ids, Ids]:
        used = self._numbers != ABSENT
        return self._keys[used], self._numbers[used]

    def _reserve(self, slots: int) -> None:
        self._keys, self._numbers = np.zeros(slots, np.int64), np.full(slots, ABSENT, np.int64)

    def _call(self, name: str, ids: Ids, numbers: Ids) -> int:
        pointers = [array.ctypes.data for array in (self._keys, self._numbers)]
        return self._library.map_call(name, *pointers, len(self._keys), ids.ctypes.data, numbers.ctypes.data, len(ids))


def native_maps() -> Callable[[], IdMap] | None:
    """Makes maps in compiled code; None where there is none."""
    library = load()
    return None if library is None else lambda: NativeMap(library)
