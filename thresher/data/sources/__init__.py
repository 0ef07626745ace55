"""Text files as users have them, read as a stream of columns. No bad line stops a read, and none is dropped silently:
each comes out as a :class:`~thresher.data.quarantine.BadRow` with file, line number and text.
"""

from thresher.data.sources.delimited import Layout, Part, header, read_delimited, require
from thresher.data.sources.files import choose_file, choose_files, find_file
from thresher.data.sources.lines import Lines, first_line, open_bytes, read_lines

__all__ = [
    "Layout",
    "Lines",
    "Part",
    "choose_file",
    "choose_files",
    "find_file",
    "first_line",
    "header",
    "open_bytes",
    "read_delimited",
    "read_lines",
    "require",
]
