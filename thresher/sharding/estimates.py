"""What TorchRec's planner reckons with, set right: bytes as they are stored, lookups as they were measured."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import SharderDataMap, ShardingOption
from torchrec.distributed.types import ModuleSharder

from thresher.embeddings.tables import FLOAT_BYTES
from thresher.sharding.cuts import BAG_TYPES, ROW_TYPES
from thresher.sharding.footprint import Footprint
from thresher.sharding.frequencies import Frequency


class Enumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """TorchRec's, with the estimators below, and in an order that does not depend on the process."""

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        footprint: Footprint,
        frequencies: Mapping[str, Frequency],
    ) -> None:
        estimators = [Times(topology, constraints, frequencies), Bytes(topology, constraints, footprint)]
        super().__init__(topology, batch_size, constraints, estimators)

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """All options. TorchRec's walks sets of strings, whose order differs between processes."""
        options: list[ShardingOption] = super().enumerate(module, sharders)
        return sorted(options, key=lambda option: (option.path, option.name, BAG_TYPES.index(option.sharding_type)))


class Bytes(EmbeddingStorageEstimator):  # type: ignore[misc]
    """Storage of shards as they are kept (tiers, optimizer state), in place of fp32 weights alone; and buffers."""

    def __init__(self, topology: Topology, constraints: dict[str, ParameterConstraints], footprint: Footprint) -> None:
        super().__init__(topology, constraints)
        self._footprint, self._on_gpu = footprint, topology.compute_device == "cuda"

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fills in ``shard.storage`` of all options."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            for shard in option.shards:
                rows, cols = shard.size
                more = self._footprint.shard_bytes(_path(option), rows, cols) - rows * cols * FLOAT_BYTES
                kind = "hbm" if self._on_gpu else "ddr"
                shard.storage = replace(shard.storage, **{kind: getattr(shard.storage, kind) + more})


class Times(EmbeddingPerfEstimator):  # type: ignore[misc]
    """Costs of shards by measured lookups. Tables that were not measured count as one lookup a sample and feature.

    The backward reads and writes each distinct row once, so its cost goes with the share of distinct rows. Where rows
    are cut, each shard's work goes with the share of the lookups that its rows get: frequent rows that lie side by side
    make one rank wait for another.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints],
        frequencies: Mapping[str, Frequency],
    ) -> None:
        super().__init__(topology, constraints)
        self._frequencies = frequencies

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Fills in ``shard.perf`` of all options."""
        for option in sharding_options:
            if _path(option) in self._frequencies:
                option.input_lengths = list(self._frequencies[_path(option)].lookups)
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            frequency = self._frequencies.get(_path(option))
            if frequency is not None:
                _weigh(option, frequency)


def _weigh(option: ShardingOption, frequency: Frequency) -> None:
    parts = len({shard.offset[0] for shard in option.shards})
    for shard in option.shards:
        skew, perf = 1.0, shard.perf
        if option.sharding_type in ROW_TYPES:
            skew = parts * frequency.share(shard.offset[0], shard.size[0], option.tensor.shape[0])
        shard.perf = replace(
            perf,
            fwd_compute=perf.fwd_compute * skew,
            bwd_compute=perf.bwd_compute * skew * frequency.distinct,
            input_dist_comms=perf.input_dist_comms * skew,
        )


def _path(option: ShardingOption) -> str:
    """The table's path in the model."""
    return f"{option.path}.{option.name}" if option.path else option.name
