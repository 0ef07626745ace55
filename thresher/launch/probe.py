"""One rank of the trial that ``thresher doctor`` makes: adds its rank to the others'."""

import sys

from thresher.launch.place import Place
from thresher.launch.rank import live


def add_ranks(place: Place, limit_s: float) -> None:
    """Adds the ranks of all processes.

    Raises:
        LaunchError: the processes do not meet within ``limit_s`` seconds.
        RuntimeError: the sum is wrong, or the connection broke.
    """
    import torch
    import torch.distributed as dist

    from thresher.launch.group import joined
    from thresher.trainer.config import LaunchConfig

    with joined(place, LaunchConfig(device="cpu", timeout_s=limit_s)):
        total = torch.tensor([place.rank])
        dist.all_reduce(total)
    if total.item() != place.world * (place.world - 1) // 2:
        raise RuntimeError(f"the ranks of {place.world} processes add up to {total.item()}")


if __name__ == "__main__":
    live(lambda place: add_ranks(place, float(sys.argv[1])))
