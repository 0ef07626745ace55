"""The errors a user may meet. Each says what was wrong, where, and what would be right.

The command line prints such an error as one message without a traceback (``--debug`` shows it). Anything else that
escapes is a bug of Thresher and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class ThresherError(Exception):
    """What was wrong, where it stands, and how to mend it.

    Args:
        what: the fault and the values that show it, one sentence without a full stop.
        where: the place a user can go to: file, config path, table, column, row.
        fix: what to do next, one sentence without a full stop.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The three parts as the command line prints them."""
        place = f"{self.where}: " if self.where else ""
        cure = f". {self.fix[:1].upper()}{self.fix[1:]}" if self.fix else ""
        return f"{type(self).__name__}: {place}{self.what}{cure}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(kind: type[ThresherError], what: str, where: str, fix: str) -> ThresherError:
    return kind(what, where=where, fix=fix)


class ConfigError(ThresherError):
    """A configuration file, an override or a command-line value is not usable."""


class SchemaError(ThresherError):
    """A schema is inconsistent, or data do not follow it."""


class DataError(ThresherError):
    """A file or data set cannot be read: missing, truncated, of another format."""


class BadBatch(DataError):
    """Rows hold values that the schema forbids, beyond what the configuration tolerates."""


class BadIds(DataError):
    """Ids of a batch are no rows of their table, or bags are not in order."""


class BadGradient(ThresherError):
    """A gradient of an embedding row is no finite number."""


class PlanError(ThresherError):
    """A sharding plan does not fit the tables, the ranks or the memory."""


class ScheduleError(ThresherError):
    """A pipeline schedule is impossible, inconsistent, or not the one the other ranks run."""


class PipelineStalled(ThresherError):
    """A message between pipeline ranks did not come in time, or the peer is gone."""


class CheckpointError(ThresherError):
    """A checkpoint is missing, corrupt, or of another model."""


class MetricError(ThresherError):
    """Predictions, labels or weights cannot be measured."""


class LaunchError(ThresherError):
    """Processes could not be started, or one of them died."""


class VersionError(ThresherError):
    """Installed libraries do not fit together."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """A clause that names the closest allowed spelling, or lists what is allowed.

    >>> nearest("recal", ["recall", "auc"])
    "did you mean 'recall'? Allowed: auc, recall"
    """
    names = sorted(allowed)
    spelt = {name.casefold(): name for name in names}
    wanted = given.casefold()
    close = difflib.get_close_matches(wanted, spelt, n=1) or [
        name for name in spelt if wanted and name.startswith(wanted)
    ]
    guess = f"did you mean '{spelt[close[0]]}'? " if close else ""
    return f"{guess}Allowed: {', '.join(names) or 'nothing'}"
