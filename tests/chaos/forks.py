"""Runs a function in a process that has imported everything and may fork, be killed or run out of limits."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from tests.multi.harness import PRELOAD

T = TypeVar("T")


def isolated(function: Callable[..., T], *args: object, timeout_s: float) -> T:
    """``function(*args)`` in a process of its own, without torch.distributed.

    Raises:
        TimeoutError: it took longer than ``timeout_s``; it and its children are killed.
        RuntimeError: it died or raised; the message holds its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout_s):
            raise TimeoutError(f"{function.__name__} is still running after {timeout_s} s")
        ok, value = ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} ended without a result") from None
    finally:
        if process.is_alive() and process.pid is not None:
            _kill_group(process.pid)
        process.join()
    if not ok:
        raise RuntimeError(value)
    return value  # type: ignore[no-any-return]


def forked(work: Callable[[], object]) -> int:
    """Starts ``work`` in a forked child, which ends with status 0 if it returns and 1 if it raises; the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Waits for a child; its exit status, negative for the signal that ended it."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _main(pipe: Connection, function: Callable[..., Any], args: tuple[object, ...]) -> None:
    import traceback

    os.setpgid(0, 0)
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
