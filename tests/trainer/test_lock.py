"""One run at a time in a run directory, whatever became of the one before."""

import errno
import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from thresher.errors import ConfigError
from thresher.trainer.lock import LOCK, locked


def test_a_second_run_is_told_who_has_the_folder(tmp_path):
    with locked(tmp_path):
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigError, match=f"{holder} trains into this folder") as caught, locked(tmp_path):
            pass
    assert caught.value.where == str(tmp_path)
    assert "run_dir" in caught.value.fix


def test_the_folder_is_free_after_a_run_and_names_the_next(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on a machine with a very long name that is gone\n")
    for _ in range(2):
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_killed_run_leaves_the_folder_free(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(tell, b"x")
            signal.pause()
    try:
        os.read(ready, 1)
        with pytest.raises(ConfigError, match=f"process {child} "), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(tmp_path):
        pass
    os.close(ready)
    os.close(tell)


def test_a_file_system_without_locks_keeps_nobody_out_and_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path), locked(tmp_path):
        assert "see to it that no other run uses this folder" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ConfigError, match="cannot be written: Is a directory") as caught, locked(tmp_path):
        pass
    assert caught.value.where == str(Path(tmp_path, LOCK))
