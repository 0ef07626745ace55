"""Every model with sharded tables on two ranks against the same model whole: losses, queries, items after steps."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.multi.harness import run_ranks
from tests.zoo.data import CPU, batch_of, part_of, shop
from thresher.data.schema import Schema
from thresher.embeddings.init import init_tables
from thresher.embeddings.optimizers import TableOptimizer
from thresher.sharding.model import shard
from thresher.sharding.planner import make_plan
from thresher.trainer.model import Model, ModelConfig, Retriever
from thresher.zoo.blocks.mlp import MlpConfig
from thresher.zoo.dcnv2.model import DcnV2Config
from thresher.zoo.deepfm.model import DeepFmConfig
from thresher.zoo.din.model import DinConfig
from thresher.zoo.dlrm.model import DlrmConfig
from thresher.zoo.fm.model import FmConfig
from thresher.zoo.lr.model import LrConfig
from thresher.zoo.sasrec.model import SasRecConfig

PLAIN = MlpConfig(hidden=(8, 4))
CONFIGS: dict[str, ModelConfig] = {
    "lr": LrConfig(pooling="sum"),
    "fm": FmConfig(dim=6),
    "deepfm": DeepFmConfig(dim=6, mlp=PLAIN),
    "dlrm": DlrmConfig(dim=8, bottom=PLAIN, top=PLAIN),
    "dcnv2": DcnV2Config(dim=8, mlp=PLAIN, cross="mixture", rank=3),
    "din": DinConfig(dim=8, mlp=PLAIN, unit=PLAIN),
    "sasrec": SasRecConfig(dim=8, dropout=0.0, negatives=2),
}
TABLES = TableOptimizer(name="sgd", lr=0.5, init_scale=0.5)
STEPS, SIZE, SEED, LR = 4, 12, 3, 0.1


def schema_of(name: str) -> Schema:
    """Weighted tags where ids are summed."""
    schema = shop()
    if name != "lr":
        return schema
    features = [f.model_copy(update={"weights": "w"}) if f.name == "tags" else f for f in schema.features]
    return schema.model_copy(update={"features": tuple(features)})


def retrieved(model: Model, schema: Schema, part: slice) -> Tensor:
    """What evaluation asks of a retriever; nothing of a ranker."""
    if not isinstance(model, Retriever):
        return torch.zeros(0)
    batch = part_of(batch_of(schema, SIZE, seed=99), part)
    return torch.cat([model.queries(batch).flatten(), model.items(torch.arange(2, 9)).flatten()]).detach()


def whole(name: str) -> tuple[list[float], list[Tensor]]:
    """Losses, and what is retrieved for each half of a batch, of the unsharded model."""
    schema = schema_of(name)
    torch.manual_seed(0)
    model = CONFIGS[name].build(schema, CPU)
    init_tables(model, SEED, TABLES.init_scale)
    tables = [p for path, p in model.named_parameters() if "collection" in path]
    dense = [p for path, p in model.named_parameters() if "collection" not in path]
    step = torch.optim.SGD([{"params": tables, "lr": TABLES.lr}, {"params": dense, "lr": LR}])
    losses = []
    for number in range(STEPS):
        batch = batch_of(schema, SIZE, seed=number, empty=number == 1)
        loss = model.loss(model(batch), batch)
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    return losses, [retrieved(model, schema, half(rank)) for rank in range(2)]


def half(rank: int) -> slice:
    return slice(rank * SIZE // 2, (rank + 1) * SIZE // 2)


def run_sharded(rank: int, world: int, name: str, kind: str) -> tuple[list[float], Tensor]:
    schema = schema_of(name)
    torch.manual_seed(0)
    model = CONFIGS[name].build(schema, torch.device("meta"))
    plan = make_plan(model, world=world, local_world=world, device="cpu", optimizer=TABLES, default=kind)
    sharded = shard(model, plan, device=CPU, optimizer=TABLES, seed=SEED)
    step = torch.optim.SGD(sharded.dense_parameters().values(), lr=LR)
    losses = []
    for number in range(STEPS):
        batch = part_of(batch_of(schema, SIZE, seed=number, empty=number == 1), half(rank))
        loss = model.loss(sharded.wrapped(batch), batch)
        step.zero_grad()
        loss.backward()
        sharded.step_tables()
        step.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses, retrieved(model, schema, half(rank))


@pytest.mark.parametrize(
    "kind",
    ["row_wise", pytest.param("table_wise", marks=pytest.mark.slow), pytest.param("auto", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_sharding_changes_no_loss(name: str, kind: str) -> None:
    losses, answers = whole(name)
    results = run_ranks(2, run_sharded, name, kind, timeout_s=120)
    assert losses[0] != losses[-1]
    for (given, answer), expected in zip(results, answers, strict=True):
        assert given == pytest.approx(losses, rel=2e-5, abs=1e-6)
        assert torch.allclose(answer, expected, atol=1e-5)
