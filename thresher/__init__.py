"""Thresher: training of huge sparse models. Each folder answers one question; ``docs/`` is the handbook."""

from thresher.versions import check_installed

__version__ = "0.1.0"

check_installed()
