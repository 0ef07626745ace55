"""The report of a run: one HTML file, made from the run directory, that opens anywhere."""

from thresher.trainer.report.build import build_report

__all__ = ["build_report"]
