"""Maps from 64-bit ids to numbers, many at a time."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
ABSENT = -1


class IdMap(Protocol):
    """From distinct int64 ids to numbers >= 0."""

    def __len__(self) -> int: ...

    def find(self, ids: Ids) -> Ids:
        """[n] numbers of ``ids`` [n]; -1 where there is none."""
        ...

    def put(self, ids: Ids, numbers: Ids) -> None:
        """Sets the numbers of distinct ``ids``, there before or not."""
        ...

    def erase(self, ids: Ids) -> None:
        """Removes distinct ``ids`` that are there."""
        ...

    def items(self) -> tuple[Ids, Ids]:
        """All ids, ascending, and their numbers."""
        ...


class DictMap:
    """An :class:`IdMap` without compiled code: the reference, tens of times slower."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def find(self, ids: Ids) -> Ids:
        """See :class:`IdMap`."""
        return np.array([self._numbers.get(key, ABSENT) for key in ids.tolist()], np.int64)

    def put(self, ids: Ids, numbers: Ids) -> None:
        """See :class:`IdMap`."""
        self._numbers.update(zip(ids.tolist(), numbers.tolist(), strict=True))

    def erase(self, ids: Ids) -> None:
        """See :class:`IdMap`."""
        for key in ids.tolist():
            del self._numbers[key]

    def items(self) -> tuple[Ids, Ids]:
        """See :class:`IdMap`."""
        ids = np.array(sorted(self._numbers), np.int64)
        return ids, self.find(ids)
