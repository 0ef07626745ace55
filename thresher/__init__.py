"""Thresher: training of huge sparse models. Each folder answers one question; ``docs/`` is the handbook."""

import sys

from thresher.versions import check_installed, is_command_line

__version__ = "0.1.0"

if not is_command_line(sys.orig_argv):
    check_installed()
