"""The three ways to train one model: ours, the same model with torch's sparse tables, and FuxiCTR's."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from benchmarks.ctr.rows import Rows
from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.embeddings.optimizers import TableOptimizer
from thresher.sharding.model import shard
from thresher.sharding.planner import make_plan
from thresher.trainer.config import DenseOptimizer, TrainConfig
from thresher.trainer.model import Model, ModelConfig
from thresher.trainer.optim import dense_optimizer
from thresher.trainer.step import Stepper
from thresher.zoo.blocks.mlp import MlpConfig
from thresher.zoo.dcnv2.model import DcnV2Config
from thresher.zoo.deepfm.model import DeepFmConfig
from thresher.zoo.lr.model import LrConfig

CPU = torch.device("cpu")
CLIP_NORM = 10.0
NAMES = ("ours", "sparse_adam", "fuxictr")


@dataclass(frozen=True)
class Task:
    """A model and its optimizers' settings, the same for every contestant.

    Attributes:
        model: ``lr``, ``deepfm`` or ``dcnv2``.
        lr: of Adam, dense and sparse.
        table_lr: of our tables' row-wise Adagrad.
        scale: our tables start uniform in (-scale, scale).
    """

    model: str
    dim: int = 16
    hidden: tuple[int, ...] = (64, 64, 64)
    dropout: float = 0.0
    lr: float = 1e-3
    table_lr: float = 0.02
    scale: float = 1e-3

    def config(self) -> ModelConfig:
        """Our model."""
        mlp = MlpConfig(hidden=self.hidden, dropout=self.dropout)
        if self.model == "lr":
            return LrConfig()
        if self.model == "deepfm":
            return DeepFmConfig(dim=self.dim, mlp=mlp)
        return DcnV2Config(dim=self.dim, mlp=mlp)


class Contestant(ABC):
    """Trains one model a step at a time."""

    @abstractmethod
    def give(self, rows: Rows) -> object:
        """The rows as it wants to find them in memory; not part of a step."""

    @abstractmethod
    def step(self, given: object, number: int) -> None:
        """Forward, loss, backward, update."""

    @abstractmethod
    def predict(self, rows: Rows) -> Tensor:
        """[N] logits or probabilities."""


class Ours(Contestant):
    """The model sharded over one rank, and the trainer's own step."""

    def __init__(self, task: Task, schema: Schema, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: Model = task.config().build(schema, torch.device("meta"))
        tables = TableOptimizer(lr=task.table_lr, init_scale=task.scale)
        plan = make_plan(self.model, world=1, local_world=1, device="cpu", optimizer=tables)
        self.sharded = shard(self.model, plan, device=CPU, optimizer=tables, seed=seed)
        dense = dense_optimizer(self.sharded.dense_parameters(), DenseOptimizer(lr=task.lr))
        self.stepper = Stepper(self.sharded, self.model, dense, TrainConfig(clip_norm=CLIP_NORM), CPU)

    def give(self, rows: Rows) -> Rows:
        return rows

    def step(self, given: object, number: int) -> None:
        assert isinstance(given, Rows)
        self.stepper.step([given.batch()], number)

    def predict(self, rows: Rows) -> Tensor:
        return predicted(self.sharded.wrapped, rows)


class SparseAdam(Contestant):
    """Our model unsharded on ``nn.EmbeddingBag(sparse=True)``, tables updated by ``torch.optim.SparseAdam``."""

    def __init__(self, task: Task, schema: Schema, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: Model = task.config().build(schema, CPU)
        bags = [module for module in self.model.modules() if isinstance(module, nn.EmbeddingBag)]
        for bag in bags:
            bag.sparse = True
        weights = [bag.weight for bag in bags]
        ids = {id(weight) for weight in weights}
        self.dense = [parameter for parameter in self.model.parameters() if id(parameter) not in ids]
        self.optimizers = [torch.optim.SparseAdam(weights, lr=task.lr), torch.optim.Adam(self.dense, lr=task.lr)]

    def give(self, rows: Rows) -> Rows:
        return rows

    def step(self, given: object, number: int) -> None:
        assert isinstance(given, Rows)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        batch: Batch = given.batch()
        loss = self.model.loss(self.model(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.dense, CLIP_NORM)
        for optimizer in self.optimizers:
            optimizer.step()

    def predict(self, rows: Rows) -> Tensor:
        return predicted(self.model, rows)


class FuxiCtr(Contestant):
    """FuxiCTR's model and its own step: Adam over every row of every table, gradients clipped at its default norm."""

    def __init__(self, task: Task, schema: Schema, seed: int) -> None:
        from benchmarks.ctr.peers import fuxictr_model

        torch.manual_seed(seed)
        self.model = fuxictr_model(task.model, schema, task.dim, task.hidden, task.dropout, task.lr)

    def give(self, rows: Rows) -> object:
        return rows.columns()

    def step(self, given: object, number: int) -> None:
        self.model.train_step(given)

    def predict(self, rows: Rows) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            found: Tensor = self.model(rows.columns())["y_pred"].flatten()
        self.model.train()
        return found


def predicted(model: nn.Module, rows: Rows) -> Tensor:
    """[N] logits of the first label."""
    model.eval()
    with torch.no_grad():
        outputs = model(rows.batch())
    model.train()
    logits: Tensor = next(iter(outputs.values()))
    return logits.float()


def contestant(name: str, task: Task, schema: Schema, seed: int) -> Contestant:
    """One of ``NAMES``."""
    kinds: dict[str, type[Ours] | type[SparseAdam] | type[FuxiCtr]] = {
        "ours": Ours,
        "sparse_adam": SparseAdam,
        "fuxictr": FuxiCtr,
    }
    return kinds[name](task, schema, seed)


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, over gloo."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
