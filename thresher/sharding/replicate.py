"""Data parallelism: of the dense part, and of tables that every rank holds whole."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.types import ShardedModule, ShardingEnv


def replicate(module: nn.Module, device: torch.device, group: ProcessGroup) -> DistributedDataParallel:
    """``module`` under DistributedDataParallel; parameters and buffers become rank 0's. Collective.

    DDP orders its buckets anew after the first backward, by the order in which gradients came. From three ranks on
    another place in a bucket means another order of summation, so a resumed run would differ in the last bit from an
    uninterrupted one. A backward of zeros at the start fixes the order before the first step.
    """
    devices = None if device.type == "cpu" else [device]
    wrapped = DistributedDataParallel(module, devices, process_group=group, gradient_as_bucket_view=True)
    wrapped.reducer.prepare_for_backward([])
    named = [(name, p) for name, p in module.named_parameters() if name not in wrapped.parameters_to_ignore]
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    torch.stack([(parameter * 0).sum() for parameter in trained]).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in trained:
        parameter.grad = None
    return wrapped


class ReplicateDense(DataParallelWrapper):  # type: ignore[misc]
    """Replicates everything but the tables; leaves a model alone on one rank or where no dense parameter is trained."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Wraps the module inside ``dmp``."""
        module = dmp._dmp_wrapped_module.to(device)
        ignored = set(_sharded_names(module))
        dense = [parameter for name, parameter in dmp.named_parameters() if name not in ignored]
        if env.world_size == 1 or not any(parameter.requires_grad for parameter in dense):
            return
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, ignored)  # type: ignore[no-untyped-call]
        dmp._dmp_wrapped_module = replicate(module, device, env.process_group)


def _sharded_names(module: nn.Module) -> Iterator[str]:
    """Names of parameters and buffers inside sharded modules: their values differ between ranks."""
    for path, child in module.named_modules():
        if isinstance(child, ShardedModule):
            prefix = f"{path}." if path else ""
            yield from child.sharded_parameter_names(path)
            yield from (f"{prefix}{name}" for name, _ in nn.Module.named_parameters(child))
            yield from (f"{prefix}{name}" for name, _ in nn.Module.named_buffers(child))
