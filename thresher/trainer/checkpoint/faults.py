"""What goes wrong while files are written or read, told as a :class:`CheckpointError`."""

import errno
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from thresher.errors import CheckpointError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def translated(error: BaseException, place: Path, needed_bytes: int = 0) -> CheckpointError:
    """The same failure with its place and what to do.

    Args:
        error: of any kind; DCP's ``CheckpointException`` (not an ``Exception``) holds one error per failed rank.
        needed_bytes: size of the checkpoint that could not be written; 0 where it plays no part.
    """
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: (not isinstance(item[1][0], OSError), item[0]))
        return _explained(cause, place, needed_bytes, f"rank {rank}: ")
    return _explained(error, place, needed_bytes, "")


def _explained(cause: BaseException, place: Path, needed_bytes: int, who: str) -> CheckpointError:
    need = f" (the checkpoint needs {needed_bytes:,} bytes)" if needed_bytes else ""
    if not isinstance(cause, OSError):
        return CheckpointError(f"{who}{type(cause).__name__}: {cause}{need}", where=str(place), fix="see the log")
    where = str(cause.filename or place)
    what = f"{who}{cause.strerror or cause}{need}"
    if cause.errno in _FULL:
        return CheckpointError(what, where=where, fix="free space there, or save to a larger file system")
    if cause.errno in _FORBIDDEN:
        return CheckpointError(what, where=where, fix="make the folder writable for this user")
    return CheckpointError(what, where=where, fix="check the file system")
