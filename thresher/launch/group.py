"""How a process becomes a rank: threads, device, process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from thresher.errors import LaunchError
from thresher.launch.logs import take_over_torch
from thresher.launch.place import Place
from thresher.trainer.config import LaunchConfig, TrainConfig
from thresher.trainer.pipelined.config import PipelineConfig
from thresher.trainer.world import World


def check_batches(train: TrainConfig, world: int, pipeline: PipelineConfig | None = None) -> None:
    """Compares the batch with the number of ranks that a launcher started.

    Args:
        pipeline: how the model is cut into stages; None for not at all.

    Raises:
        LaunchError: ranks would get unequal parts, or form no whole pipelines; names what fits.
    """
    if pipeline is not None and pipeline.is_on:
        if world % pipeline.stages:
            raise LaunchError(
                f"{world} processes do not form pipelines of {pipeline.stages} stages",
                where=f"world size {world}",
                fix=f"start a multiple of {pipeline.stages} processes, or set pipeline.stages to a divisor of {world}",
            )
        pipelines, factor = world // pipeline.stages, pipeline.microbatches
        _require_multiple(train, world, f"{pipelines} pipelines x pipeline.microbatches {factor}", pipelines * factor)
    else:
        factors = f"{world} processes x train.accumulate {train.accumulate}"
        _require_multiple(train, world, factors, world * train.accumulate)


def _require_multiple(train: TrainConfig, world: int, factors: str, parts: int) -> None:
    below = train.batch_size // parts * parts
    if below == train.batch_size:
        return
    fitting = " or ".join(str(size) for size in (below, below + parts) if size)
    raise LaunchError(
        f"train.batch_size {train.batch_size} is not divisible by {factors} = {parts}",
        where=f"world size {world}",
        fix=f"set train.batch_size to {fitting}, or start another number of processes",
    )


def check_device(launch: LaunchConfig, local_world: int) -> str:
    """``cpu`` or ``cuda``, whichever ``local_world`` ranks on this machine are to use.

    Raises:
        LaunchError: CUDA is asked for, and this machine or this build of torch has too few devices.
    """
    devices = torch.cuda.device_count() if launch.device != "cpu" and torch.cuda.is_available() else 0
    if launch.device == "cuda" and devices < local_world:
        has = f"{devices} CUDA devices" if torch.version.cuda else f"a CPU build of torch ({torch.__version__})"
        raise LaunchError(
            f"{local_world} processes need a CUDA device each, this machine has {has}",
            where="launch.device",
            fix="set launch.device=cpu, start fewer processes, or install with 'make setup DEVICE=cuda'",
        )
    return "cuda" if devices >= local_world else "cpu"


@contextmanager
def joined(place: Place, launch: LaunchConfig) -> Iterator[World]:
    """Sets threads and device, and joins the process group for as long as nothing fails.

    A failing rank leaves the group as it is: taking it down would wait for peers.

    Raises:
        LaunchError: there is no such device, or the ranks did not meet in time.
    """
    take_over_torch()
    kind = check_device(launch, place.local_world)
    torch.set_num_threads(launch.threads)
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", place.local_rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl",
            timeout=timedelta(seconds=launch.timeout_s),
            rank=place.rank,
            world_size=place.world,
        )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"the {place.world} ranks did not meet: {error}",
            where=f"rank {place.rank}",
            fix="look into the other ranks' logs; check MASTER_ADDR and MASTER_PORT if you set them",
        ) from error
    yield World(place.rank, place.world, place.local_rank, place.local_world, device)
    dist.destroy_process_group()
