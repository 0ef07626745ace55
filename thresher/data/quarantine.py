"""Bad rows: counted, kept with their place of origin, and fatal above a stated share."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from thresher.errors import BadBatch

FILE = "quarantine.jsonl"
_SETTLED_ROWS = 10_000  # before so many rows, one bad row could exceed any sensible share


@dataclass(frozen=True)
class BadRow:
    """A row that the schema forbids.

    Attributes:
        file: where it stands.
        row: its number in ``file``, counted from 1: the line number of a text file (a header is line 1).
        reason: what is wrong, naming the column and the value.
        raw: the line as it stands, or its values as JSON.
    """

    file: str
    row: int
    reason: str
    raw: str


class Quarantine:
    """Writes bad rows to ``quarantine.jsonl``, one JSON object a row; the file exists only if there are any.

    Args:
        folder: where the file goes.
        max_bad_share: bad rows over all rows above which :meth:`check` fails.

    Attributes:
        rows, bad: counted so far.
        by_place: bad rows by the feature or column that their reason begins with.
    """

    def __init__(self, folder: Path, max_bad_share: float) -> None:
        self.path = folder / FILE
        self.max_bad_share = max_bad_share
        self.rows = 0
        self.bad = 0
        self.by_place: Counter[str] = Counter()
        self._first: BadRow | None = None

    def add(self, rows: int, bad: Iterable[BadRow]) -> None:
        """Counts ``rows`` rows, of which ``bad`` are bad, and writes those.

        Raises:
            BadBatch: the share of bad rows is above the limit already, after enough rows to tell.
        """
        self.rows += rows
        lines = []
        for row in bad:
            self._first = self._first or row
            self.by_place[row.reason.split(":", 1)[0]] += 1
            lines.append(json.dumps(asdict(row), ensure_ascii=False))
        if lines:
            self.bad += len(lines)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        if self.rows >= _SETTLED_ROWS:
            self.check()

    def check(self) -> None:
        """Raises if too many rows are bad.

        Raises:
            BadBatch: names the first bad row, the share and the limit.
        """
        if self._first is None or self.bad <= self.max_bad_share * self.rows:
            return
        raise BadBatch(
            f"{self._first.reason}; {self.bad} of {self.rows} rows are bad, allowed is a share of {self.max_bad_share}",
            where=f"{self._first.file}, row {self._first.row}",
            fix=f"mend the rows listed in {self.path}, or raise max_bad_share",
        )
