"""A program that knows nothing but TorchRec; ``test_migration.py`` changes the lines that the handbook says."""

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.optim.optimizers import in_backward_optimizer_filter

ROWS, DIM, BATCH, STEPS = 5000, 64, 32, 12
FUSED = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "eps": 1e-8}
TABLES = ("user", "item", "shop")


class Clicks(nn.Module):
    """Logits from pooled vectors."""

    def __init__(self) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=DIM, feature_names=[name])
            for name in TABLES
        ]
        self.bags = EmbeddingBagCollection(configs)
        self.top = nn.Linear(DIM * len(TABLES), 1)

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        return self.top(self.bags(kjt).values())[:, 0]


def batch(rank: int, step: int) -> tuple[KeyedJaggedTensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    lengths = torch.randint(0, 6, (len(TABLES) * BATCH,), generator=generator)
    ids = (torch.rand(int(lengths.sum()), generator=generator) ** 4 * ROWS).long()
    labels = torch.randint(0, 2, (BATCH,), generator=generator).float()
    return KeyedJaggedTensor(list(TABLES), ids, lengths=lengths), labels


def train(rank: int, world: int) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    model = Clicks()
    sharders = [EmbeddingBagCollectionSharder(fused_params=FUSED)]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world, compute_device="cpu"),
        constraints={name: ParameterConstraints(sharding_types=["table_wise"]) for name in TABLES},
    )
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    model = DistributedModelParallel(model, plan=plan, sharders=sharders)
    dense = torch.optim.SGD(dict(in_backward_optimizer_filter(model.named_parameters())).values(), lr=0.1)
    losses = []
    for step in range(STEPS):
        kjt, labels = batch(rank, step)
        loss = nn.functional.binary_cross_entropy_with_logits(model(kjt), labels)
        dense.zero_grad()
        loss.backward()
        dense.step()
        losses.append(float(loss.detach()))
    return losses, model
