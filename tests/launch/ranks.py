"""Ranks that misbehave, for ``run_ranks``: ``-m tests.launch.ranks MODE [FOLDER]``. Rank 1 is the one at fault."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from thresher.errors import DataError
from thresher.launch.place import Place
from thresher.launch.rank import live


def reduce_with_peers(place: Place) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=place.rank, world_size=place.world)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == place.world


def misbehave(place: Place, mode: str) -> None:
    if mode == "user error":
        raise DataError("no such column 'price'", where="train/part-00000.parquet", fix="prepare the data again")
    if mode == "bug":
        raise ZeroDivisionError("the planted bug")
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "crashed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "exit code":
        os._exit(7)


def work(place: Place) -> None:
    mode = sys.argv[1]
    if mode == "quiet":
        logging.getLogger("thresher.test").info("an info of rank %d", place.rank)
        logging.getLogger("thresher.test").warning("a warning of rank %d", place.rank)
        warnings.warn("a library's warning", stacklevel=1)
        warnings.warn_explicit("a note of ours", UserWarning, str(Path(live.__code__.co_filename)), 1)
        logging.getLogger("library").warning("a library's record")
        logging.getLogger("library").error("a library's error")
        print(f"a print of rank {place.rank}")
    elif mode == "hangs at exit":
        atexit.register(time.sleep, 600)
        threading.Thread(target=time.sleep, args=(600,)).start()
    elif mode == "sleeps":
        Path(sys.argv[2], f"pid-{place.rank}").write_text(str(os.getpid()))
        time.sleep(600)
    elif mode == "terminal":
        print(f"rank {place.rank} has a terminal: {sys.stdout.isatty()}")
    else:
        reduce_with_peers(place)
        if place.rank == 1:
            misbehave(place, mode)
        reduce_with_peers_again(place)


def reduce_with_peers_again(place: Place) -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    raise AssertionError(f"rank {place.rank} did not notice that its peer is gone")


if __name__ == "__main__":
    live(work)
