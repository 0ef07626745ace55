"""Runs a function on several gloo ranks, within a deadline, and leaves no process behind.

    def case(rank: int, world: int, text: str) -> str:
        ...                                  # torch.distributed is initialised, one thread, rank and world are told
    first, second = run_ranks(2, case, "x", timeout_s=60)

``case`` is a module-level function of an importable module (``tests.multi.test_x``); arguments and results are pickled.
Ranks are forked from a server that has imported torch and torchrec already: half a second each instead of fifteen.
"""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "torchrec.distributed", "thresher.sharding.model"]
GRACE_S = 1.0
"""How long the other ranks may go on after one failed: the first failure is often reported by several."""


class RankDied(Exception):
    """A rank ended without a result: it was killed, or called ``os._exit``."""


class RanksHung(Exception):
    """Ranks were still running at the deadline; the message holds their stacks."""


@dataclass
class _Rank:
    number: int
    process: ForkServerProcess
    pipe: Connection
    result: "_Answer | None" = None


@dataclass
class _Answer:
    """What a rank returned (``value``) or raised (``error``, with its traceback as text)."""

    value: Any = None
    error: Exception | None = None
    trace: str = ""


def run_ranks(
    world: int, function: Callable[..., T], *args: object, timeout_s: float, local_world: int | None = None
) -> list[T]:
    """``function(rank, world, *args)`` on ``world`` gloo ranks; their results by rank.

    Args:
        timeout_s: deadline for all of it, process start included.
        local_world: ranks per machine that the ranks are told (``LOCAL_WORLD_SIZE``); None for all on one.

    Raises:
        Exception: what the first failing rank raised, with a note that names the rank and holds its traceback.
        RankDied: a rank ended without a result.
        RanksHung: the deadline passed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="thresher-ranks-") as folder:
        ranks = [
            _start(context, n, world, local_world or world, folder, timeout_s, function, args) for n in range(world)
        ]
        try:
            _collect(ranks, time.monotonic() + timeout_s, Path(folder))
        finally:
            _end(ranks)
    return [rank.result.value for rank in ranks if rank.result is not None]


def _start(
    context: Any,
    number: int,
    world: int,
    local_world: int,
    folder: str,
    timeout_s: float,
    function: Callable[..., object],
    args: tuple[object, ...],
) -> _Rank:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_rank_main, args=(number, world, local_world, folder, timeout_s, theirs, function, args), daemon=True
    )
    process.start()
    theirs.close()
    return _Rank(number, process, ours)


def _collect(ranks: list[_Rank], deadline: float, folder: Path) -> None:
    failed: list[_Answer] = []
    while waiting := {rank.pipe: rank for rank in ranks if rank.result is None}:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready and failed:
            break
        if not ready:
            raise RanksHung(_stacks(list(waiting.values()), folder))
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            rank.result = _receive(rank)
            if rank.result.error is not None:
                failed.append(rank.result)
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if failed and failed[0].error is not None:
        failed[0].error.add_note(failed[0].trace)
        raise failed[0].error


def _receive(rank: _Rank) -> _Answer:
    try:
        return pickle.loads(rank.pipe.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        rank.process.join(5)
        death = RankDied(f"rank {rank.number} ended without a result, exit code {rank.process.exitcode}")
        return _Answer(error=death)


def _stacks(ranks: list[_Rank], folder: Path) -> str:
    names = ", ".join(str(rank.number) for rank in ranks)
    time.sleep(GRACE_S)
    files = [(rank.number, folder / f"stack-{rank.number}") for rank in ranks]
    texts = [f"--- rank {number}\n{path.read_text()}" for number, path in files if path.exists()]
    return "\n".join([f"ranks {names} were still running at the deadline", *texts])


def _end(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.result is None or rank.result.error is not None:
            rank.process.kill()
    for rank in ranks:
        rank.process.join(10)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.process.close()
        rank.pipe.close()


def _rank_main(
    rank: int,
    world: int,
    local_world: int,
    folder: str,
    timeout_s: float,
    pipe: Connection,
    function: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    _environment(rank, world, local_world)
    limit = timedelta(seconds=timeout_s + 60)
    with Path(folder, f"stack-{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(timeout_s, file=stack)
        try:
            rendezvous = f"file://{folder}/store"
            dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world, timeout=limit)
            answer = _Answer(function(rank, world, *args))
            dist.barrier()
            dist.destroy_process_group()
        except Exception as error:
            answer = _Answer(error=error, trace=f"on rank {rank} of {world}:\n{traceback.format_exc()}")
        faulthandler.cancel_dump_traceback_later()
    _send(pipe, answer)


def _environment(rank: int, world: int, local_world: int) -> None:
    """What a launcher would tell; TorchRec reads ``LOCAL_WORLD_SIZE`` to know which ranks share a machine."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank % local_world),
        LOCAL_WORLD_SIZE=str(local_world),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)


def _send(pipe: Connection, answer: _Answer) -> None:
    try:
        message = pickle.dumps(answer)  # not pipe.send: torch would hand over tensors through the dying process
    except Exception as problem:  # what a function returns or raises need not be picklable
        error = RuntimeError(f"cannot send the rank's answer {answer.value or answer.error!r:.200}: {problem}")
        message = pickle.dumps(_Answer(error=error, trace=answer.trace))
    pipe.send_bytes(message)
    pipe.close()
