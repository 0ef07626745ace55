"""A pipeline on CUDA devices: the gradients of the CPU, on one device and, over NCCL, on two."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.pipeline.runtime.tiny import SEED, Reference, Tiny, packed, padded
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.runtime.groups import make_groups
from thresher.pipeline.runtime.options import RuntimeOptions
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import build_parts
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule

GPUS = torch.cuda.device_count()
LIMIT = timedelta(seconds=60)


def moved(microbatch: Microbatch, device: torch.device) -> Microbatch:
    times = None if microbatch.times is None else microbatch.times.to(device)
    weights = microbatch.weights.float().to(device)
    return Microbatch(microbatch.layout, microbatch.inputs.to(device), microbatch.targets.to(device), weights, times)


def gradients(rank, stages, device, build, given, **settings):
    """Of the layers that ``rank`` holds, by name."""
    schedule = build_schedule(stages, 2, len(given), 4, **settings)
    parts = build_parts(build, schedule.shape, rank, device)
    groups = make_groups(schedule, [range(stages)], LIMIT) if stages > 1 else None
    runtime = PipelineRuntime(schedule, parts, groups, RuntimeOptions(timeout=LIMIT, seed=SEED))
    runtime.step([moved(microbatch, device) for microbatch in given])
    return {name: p.grad.cpu() for stage in parts.stages for name, p in stage.named_parameters()}


def require_close(found, build, given):
    model = Reference(build)
    model.loss([moved(microbatch, torch.device("cpu")) for microbatch in given]).backward()
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("batches", [padded, packed])
def test_one_device_has_the_gradients_of_the_cpu(pointwise, batches):
    build, given = Tiny(dtype=torch.float32, pointwise=pointwise), batches(2, 4)
    require_close(gradients(0, 1, torch.device("cuda"), build, given), build, given)


def on_nccl(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("nccl", f"file://{folder}/store", rank=rank, world_size=2, timeout=LIMIT)
    build, given = Tiny(dtype=torch.float32), padded(2, 4)
    rule = ExchangeRule(forced=True)
    found = gradients(rank, 2, torch.device("cuda", rank), build, given, exchange=rule, split_head=True)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_two_devices_over_nccl_have_the_gradients_of_the_cpu(tmp_path):
    mp.spawn(on_nccl, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "0.pt") | torch.load(tmp_path / "1.pt")
    require_close(found, Tiny(dtype=torch.float32), padded(2, 4))
