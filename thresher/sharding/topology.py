"""What the planner believes of the machines: memory a rank may use, and bandwidths that rank sharding options.

CPU figures were measured with FBGEMM's fused kernel and gloo on a 2-core machine (8 tables x 100k x 64, batch 2 x 2048,
bags of 10): a lookup reads 42 MB in 5.6 ms, an all-to-all moves 2 MB to the other rank in 1.5 ms. Between machines
10 Gbit/s are assumed. CUDA figures are TorchRec's own. Only their ratios matter to a plan.
"""

import os
from pathlib import Path

import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

TABLE_SHARE = 0.8
"""Share of the memory found that tables may take where nothing is stated."""
CPU_ROWS_BYTES_PER_MS = 7.5e6
CPU_WITHIN_BYTES_PER_MS = 1.3e6
CPU_BETWEEN_BYTES_PER_MS = 1.2e6


def make_topology(world: int, local_world: int, device: str, memory_bytes: int) -> Topology:
    """TorchRec's view of ``world`` ranks, ``local_world`` a machine, each with ``memory_bytes`` for tables.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    trainer = TrainerConfig(world_size=world, local_world_size=local_world)
    if device == "cuda":
        cuda = HardwareConfig(hbm_cap_bytes=memory_bytes)
        return TopologyFactory.create_topology(trainer, cuda, KernelConfig(compute_device="cuda"))
    cpu = HardwareConfig(
        ddr_cap_bytes=memory_bytes,
        ddr_mem_bw=CPU_ROWS_BYTES_PER_MS,
        intra_host_bw=CPU_WITHIN_BYTES_PER_MS,
        inter_host_bw=CPU_BETWEEN_BYTES_PER_MS,
    )
    kernel = KernelConfig(compute_device="cpu", use_hardware_based_bandwidth=True)
    return TopologyFactory.create_topology(trainer, cpu, kernel)


def table_memory(device: str, local_world: int) -> int:
    """Bytes a rank may use for tables: a share of its GPU, or of the machine's memory divided by its ranks."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory * TABLE_SHARE)
    return int(_machine_bytes() * TABLE_SHARE) // local_world


def _machine_bytes() -> int:
    """Physical memory, or the container's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical
