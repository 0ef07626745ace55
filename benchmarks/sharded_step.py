"""A whole training step of sharded tables beside TorchRec's own, on the same plan.

``python -m benchmarks.sharded_step [--quick] [--json PATH]``

Two ranks of one thread each. ``multi-hot``: 8 tables of 200,000 x 64, bags of 20 ids. ``one-hot``: 26 tables of
100,000 x 16, one id each, as in Criteo's data. Behind the tables stands a perceptron of 64 units; batch 2,048 a rank,
row-wise Adagrad. TorchRec's sharders run as they are, but for row-wise sharding, which they refuse on CPU without a
reason of today: there the refusal alone is lifted. Both models take their steps in turn, on the same ids; milliseconds
of the slowest rank, wall and CPU, ratios those of one round.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ShardingEnv

from benchmarks import measure
from tests.multi.harness import run_ranks
from thresher.embeddings.optimizers import TableOptimizer, fused_params
from thresher.sharding.cuts import BAG_TYPES
from thresher.sharding.model import shard
from thresher.sharding.plan import Plan
from thresher.sharding.planner import make_plan
from thresher.sharding.translate import to_torchrec

BATCH = 2048
OPTIMIZER = TableOptimizer(name="rowwise_adagrad", lr=0.01)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One setting."""

    tables: int
    rows: int
    dim: int
    length: int
    sharding_type: str


class Net(nn.Module):
    """Tables and a perceptron."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        configs = [
            EmbeddingBagConfig(name=f"t{n}", num_embeddings=case.rows, embedding_dim=case.dim, feature_names=[f"f{n}"])
            for n in range(case.tables)
        ]
        self.bags = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        self.top = nn.Sequential(nn.Linear(case.tables * case.dim, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        """[B] logits."""
        logits: Tensor = self.top(self.bags(ids).values()).squeeze(1)
        return logits


class OpenSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """TorchRec's, without its refusal of row-wise sharding on CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All types."""
        return list(BAG_TYPES)


def batch(case: Case, rank: int, number: int) -> tuple[KeyedJaggedTensor, Tensor]:
    """Ids (Zipf 1.05 over shuffled rows, as clicks have it) and labels of one step of one rank."""
    generator = torch.Generator().manual_seed(number * 100 + rank)
    n = case.tables * BATCH * case.length
    weights = torch.arange(1, case.rows + 1, dtype=torch.float64).pow(-1.05).cumsum(0)
    ranks = torch.searchsorted(weights / weights[-1], torch.rand(n, generator=generator, dtype=torch.float64))
    shuffled = torch.randperm(case.rows, generator=torch.Generator().manual_seed(0))
    ids = shuffled[ranks.clamp(max=case.rows - 1)]
    lengths = torch.full((case.tables * BATCH,), case.length)
    keys = [f"f{n}" for n in range(case.tables)]
    labels = torch.rand(BATCH, generator=generator).round()
    return KeyedJaggedTensor(keys=keys, values=ids, lengths=lengths), labels


class Contestant:
    """A sharded model and its dense optimizer."""

    def __init__(self, wrapped: nn.Module, dense: list[nn.Parameter]) -> None:
        self.wrapped, self.optimizer = wrapped, torch.optim.SGD(dense, lr=0.01)

    def step(self, ids: KeyedJaggedTensor, labels: Tensor) -> tuple[float, float]:
        """Wall and CPU seconds of a step."""
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(self.wrapped(ids), labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return time.perf_counter() - wall, time.process_time() - cpu


def ours(case: Case, plan: Plan) -> Contestant:
    """Our engine under TorchRec's sharding."""
    model = shard(Net(case), plan, device=CPU, optimizer=OPTIMIZER, seed=0)
    return Contestant(model.wrapped, list(model.dense_parameters().values()))


def torchrecs(case: Case, plan: Plan) -> Contestant:
    """TorchRec with FBGEMM's fused kernel."""
    group = dist.group.WORLD
    assert group is not None
    wrapped = DistributedModelParallel(
        Net(case),
        env=ShardingEnv.from_process_group(group),
        device=CPU,
        plan=to_torchrec(plan, "cpu"),
        sharders=[OpenSharder(fused_params=fused_params(OPTIMIZER))],
    )
    dense = [p for name, p in wrapped.named_parameters() if "top" in name]
    return Contestant(wrapped, dense)


def race(rank: int, world: int, case: Case, repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step of both, on this rank."""
    torch.set_num_threads(1)
    tables = dict.fromkeys((f"t{n}" for n in range(case.tables)), case.sharding_type)
    plan = make_plan(
        Net(case), world=world, local_world=world, device="cpu", optimizer=OPTIMIZER, tables=tables, batch_size=BATCH
    )
    racers = {"ours": ours(case, plan), "torchrec": torchrecs(case, plan)}
    batches = [batch(case, rank, number) for number in range(4)]
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in racers}
    for turn in range(repetitions + 2):
        for name, racer in racers.items():
            seconds = racer.step(*batches[turn % len(batches)])
            if turn >= 2:
                spent[name].append(seconds)
    return spent


def run_case(case: Case, repetitions: int) -> dict[str, float]:
    """Milliseconds and ratios; of each step, the slowest rank counts."""
    ranks = run_ranks(2, race, case, repetitions, timeout_s=500)
    found: dict[str, float] = {}
    for place, clock in enumerate(("wall", "cpu")):
        slowest = {
            name: [max(one[name][turn][place] for one in ranks) for turn in range(repetitions)] for name in ranks[0]
        }
        for name, seconds in slowest.items():
            found[f"{name}_{clock}_ms"] = statistics.median(seconds) * 1e3
        pairs = zip(slowest["ours"], slowest["torchrec"], strict=True)
        found[f"times_{clock}"] = statistics.median(theirs / mine for mine, theirs in pairs)
    return found


def cases() -> dict[str, Case]:
    """All settings by name."""
    kinds = ("table_wise", "row_wise")
    multi = {f"multi-hot {kind}": Case(8, 200_000, 64, 20, kind) for kind in kinds}
    return multi | {f"one-hot {kind}": Case(26, 100_000, 16, 1, kind) for kind in kinds}


def main() -> None:
    """Measures and reports."""
    chosen = measure.options(measure.parser("sharded_step: a step beside TorchRec's own").parse_args())
    found = {name: run_case(case, 5 if chosen.quick else 21) for name, case in cases().items()}
    shown = ("times_wall", "times_cpu", "ours_wall_ms", "torchrec_wall_ms", "ours_cpu_ms", "torchrec_cpu_ms")
    rows = [[name, *(one[key] for key in shown)] for name, one in found.items()]
    results: dict[str, Any] = {"cases": found}
    for kind in ("multi-hot", "one-hot"):
        results[f"min_{kind.replace('-', '_')}"] = min(one["times_wall"] for name, one in found.items() if kind in name)
    measure.report("A sharded step; ours is so many times faster", ["setting", *shown], rows, results, chosen)


if __name__ == "__main__":
    main()
