"""The report, made anew whenever there is something new to read."""

import logging
from pathlib import Path

from thresher.errors import ThresherError
from thresher.trainer.callbacks.base import Callback, EndRecord, EvalRecord
from thresher.trainer.report import build_report

log = logging.getLogger(__name__)


class Report(Callback):
    """Writes ``report.html`` at every evaluation and at the end, from what is on disk: runs after ``Records``.

    A report can be built again at any time, so one that cannot be written does not stop the run: the log says so.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_eval(self, record: EvalRecord) -> None:
        self._build()

    def on_end(self, record: EndRecord) -> None:
        self._build()

    def _build(self) -> None:
        try:
            build_report(self._folder)
        except (OSError, ThresherError) as error:
            log.warning("the report was not written: %s", error)
        except Exception:
            log.exception("the report was not written; this is a bug of Thresher, and no reason to lose the run")
