"""Agreement among ranks: what one rank learns, all learn, before anyone goes on or raises.

A failure on one rank must neither leave the others waiting in a collective nor let them go on alone. Work that can fail
therefore runs inside :meth:`Ranks.each` or :meth:`Ranks.first`, which end in exactly one collective on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from thresher.errors import CheckpointError
from thresher.trainer.checkpoint.faults import translated

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    failure: CheckpointError | None = None


class Ranks:
    """The ranks of ``group`` (None for the default group); a single one where torch.distributed is not initialised."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.world = dist.get_world_size(group) if self.distributed else 1

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def each(self, work: Callable[[], T], place: Path) -> T:
        """Every rank does ``work`` and gets its own result.

        Raises:
            CheckpointError: on every rank, if ``work`` failed on any.
        """
        outcome, error = _attempt(work, place)
        self._settle(error, self.gather(outcome.failure))
        return outcome.value  # type: ignore[no-any-return]

    def first(self, work: Callable[[], T], place: Path, needed_bytes: int = 0) -> T:
        """Rank 0 does ``work``; every rank gets its result.

        Args:
            needed_bytes: told in the error if the disk is full.

        Raises:
            CheckpointError: on every rank, if ``work`` failed.
        """
        outcome, error = _attempt(work, place, needed_bytes) if self.rank == 0 else (_Outcome(), None)
        answer = self.gather(outcome)[0]
        self._settle(error, [answer.failure])
        return answer.value  # type: ignore[no-any-return]

    def _settle(self, error: Exception | None, failures: list[CheckpointError | None]) -> None:
        if error is not None:
            raise error
        for failure in failures:
            if failure is not None:
                raise failure


def _attempt(work: Callable[[], T], place: Path, needed_bytes: int = 0) -> tuple[_Outcome, Exception | None]:
    """The outcome to tell the others, and the exception to raise here: of a bug, the original with its traceback."""
    try:
        return _Outcome(work()), None
    except CheckpointError as error:
        return _Outcome(failure=error), error
    except OSError as error:
        known = translated(error, place, needed_bytes)
        return _Outcome(failure=known), known
    except Exception as error:
        return _Outcome(failure=translated(error, place)), error
