"""Data parallelism of the dense part."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.types import ShardedModule, ShardingEnv


class ReplicateDense(DataParallelWrapper):  # type: ignore[misc]
    """DistributedDataParallel around everything but the tables, and nothing where no dense parameter is trained.

    Buckets keep their first order (``find_unused_parameters``): otherwise DDP reorders them after the first step, sums
    of three or more ranks are then taken in another order, and a resumed run would differ in the last bit from an
    uninterrupted one. It also lets a batch leave dense parameters without a gradient. Buffers are rank 0's.
    """

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Wraps the module inside ``dmp``."""
        module = dmp._dmp_wrapped_module
        ignored = set(_sharded_names(module))
        dense = [p for name, p in dmp.named_parameters() if name not in ignored]
        if not any(parameter.requires_grad for parameter in dense):
            return
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, ignored)  # type: ignore[no-untyped-call]
        dmp._dmp_wrapped_module = DistributedDataParallel(
            module.to(device),
            device_ids=None if device.type == "cpu" else [device],
            process_group=env.process_group,
            gradient_as_bucket_view=True,
            find_unused_parameters=True,
        )


def _sharded_names(module: nn.Module) -> Iterator[str]:
    """Names of parameters and buffers inside sharded modules: their values differ between ranks."""
    for path, child in module.named_modules():
        if isinstance(child, ShardedModule):
            prefix = f"{path}." if path else ""
            yield from child.sharded_parameter_names(path)
            yield from (f"{prefix}{name}" for name, _ in nn.Module.named_parameters(child))
            yield from (f"{prefix}{name}" for name, _ in nn.Module.named_buffers(child))
