"""The optimizer of table rows as a user sets it, and what becomes of it where tables are not ours to update.

``kernels/rules.py`` has the arithmetic. Three things apply it: a backend, to the rows that a lookup touched, inside its
backward; :class:`ReplicatedTables`, to dense gradients of tables that every rank holds whole; and FBGEMM on CUDA, for
tables without tiers, where it knows the same formula (:func:`fused_params`).

State of a table has the names that TorchRec's fused kernels give it, where they have the optimizer:

    sgd                nothing
    adagrad            momentum1 [rows, dim]  v
    rowwise_adagrad    momentum1 [rows]       s
    adam               momentum1 [rows, dim]  m      exp_avg_sq [rows, dim]  v      step []  t
    rowwise_adam       momentum1 [rows, dim]  m      exp_avg_sq [rows]       s      step []  t
    ftrl               z [rows, dim]                 n [rows, dim]
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from thresher.embeddings.kernels.backend import pick_backend
from thresher.embeddings.kernels.bags import Bags, Pooling
from thresher.embeddings.kernels.rules import HAS_SCALAR, NEVER, VECTORS, RowOptimizerName, UpdateRule
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.tables import FLOAT_BYTES
from thresher.settings import Settings

Momentum = Annotated[float, Field(ge=0, lt=1)]
STEP = "step"
_SCALAR_NAMES: dict[RowOptimizerName, str] = {"rowwise_adagrad": "momentum1", "rowwise_adam": "exp_avg_sq"}
_VECTOR_NAMES: dict[RowOptimizerName, tuple[str, ...]] = {
    "adagrad": ("momentum1",),
    "adam": ("momentum1", "exp_avg_sq"),
    "rowwise_adam": ("momentum1",),
    "ftrl": ("z", "n"),
}
_FBGEMM: dict[RowOptimizerName, EmbOptimType] = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
}
_DECAYS: dict[RowOptimizerName, dict[str, WeightDecayMode]] = {
    "rowwise_adagrad": {"l2": WeightDecayMode.L2, "decoupled": WeightDecayMode.DECOUPLE},
    "adam": {"decoupled": WeightDecayMode.NONE},
    "rowwise_adam": {"decoupled": WeightDecayMode.NONE},
}
"""Decays that FBGEMM's CUDA kernels have, by optimizer, and the mode that asks for them. Adam's is always decoupled."""


class TableOptimizer(Settings):
    """The optimizer of the embedding tables, applied inside the backward to the touched rows only.

    Attributes:
        name: arithmetic of each in ``kernels/rules.py``.
        betas: of ``adam`` and ``rowwise_adam``.
        ftrl_beta, l1, l2: of ``ftrl``.
        weight_decay: strength of the decay of touched rows; ``decay`` adds it to the gradient (l2) or shrinks the row
            by lr x weight_decay before the step (decoupled).
        column_state: what row-wise optimizers do where a table is cut by columns. ``exact`` sums squares over the whole
            row (a small all-reduce); ``separate`` keeps a scalar for each column shard, as TorchRec does.
        init_scale: rows start uniform in (-init_scale, init_scale); 0 for 1/sqrt(rows) of the table.
    """

    name: RowOptimizerName = "rowwise_adagrad"
    lr: float = Field(default=0.02, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    ftrl_beta: float = Field(default=1.0, ge=0)
    l1: float = Field(default=0.0, ge=0)
    l2: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    decay: Literal["l2", "decoupled"] = "l2"
    column_state: Literal["exact", "separate"] = "exact"
    init_scale: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _has_a_use(self) -> "TableOptimizer":
        for name in ("l1", "l2"):
            if self.name != "ftrl" and getattr(self, name):
                raise ValueError(
                    f"{name} is of ftrl, and {self.name} does not read it; set weight_decay, or choose ftrl"
                )
        return self

    @property
    def has_scalar(self) -> bool:
        """Whether the optimizer keeps one number a row."""
        return self.name in HAS_SCALAR

    @property
    def vectors(self) -> int:
        """How many numbers the optimizer keeps for each weight."""
        return VECTORS[self.name]

    @property
    def scalar_name(self) -> str:
        """What the one number a row is called in state dicts; empty where there is none."""
        return _SCALAR_NAMES.get(self.name, "")

    @property
    def vector_names(self) -> tuple[str, ...]:
        """What the numbers for each weight are called in state dicts, in the order of ``kernels/rules.py``."""
        return _VECTOR_NAMES.get(self.name, ())

    @property
    def counts_steps(self) -> bool:
        """Whether the updates of a table are part of its optimizer's state."""
        return self.name in ("adam", "rowwise_adam")

    def state_bytes(self, rows: int, dim: int) -> int:
        """Bytes of fp32 optimizer state of a [rows, dim] table or shard."""
        return rows * (self.has_scalar + dim * self.vectors) * FLOAT_BYTES

    def rule(self, lr: float, step: int, priority_gain: float = 0.0, above: tuple[float, ...] = NEVER) -> UpdateRule:
        """What update number ``step`` (from 1) of a table does, at learning rate ``lr``."""
        first, second = self.betas
        return UpdateRule(
            name=self.name,
            lr=lr,
            eps=self.eps,
            beta1=first,
            beta2=second,
            correction1=1.0 / (1.0 - first**step),
            correction2=1.0 / (1.0 - second**step),
            ftrl_beta=self.ftrl_beta,
            l1=self.l1,
            l2=self.l2,
            weight_decay=self.weight_decay,
            decay=self.decay,
            priority_gain=priority_gain,
            promote_above=above,
        )


def fused_params(optimizer: TableOptimizer) -> dict[str, Any]:
    """TorchRec's ``fused_params`` for FBGEMM's CUDA kernels; empty where they have no such optimizer or decay.

    FBGEMM has no FTRL, ignores weight decay for SGD and Adagrad, and knows no L2 decay for Adam. Ids outside the table
    stop the run; FBGEMM's default reads row 0 for them.
    """
    decay = _DECAYS.get(optimizer.name, {}).get(optimizer.decay)
    if optimizer.name not in _FBGEMM or (optimizer.weight_decay and decay is None):
        return {}
    params = {"optimizer": _FBGEMM[optimizer.name], "learning_rate": optimizer.lr, "eps": optimizer.eps}
    if optimizer.counts_steps:
        params |= {"beta1": optimizer.betas[0], "beta2": optimizer.betas[1]}
    if optimizer.weight_decay:
        params |= {"weight_decay": optimizer.weight_decay, "weight_decay_mode": decay}
    return params | {"bounds_check_mode": BoundsCheckMode.FATAL}


class ReplicatedTables(KeyedOptimizer):  # type: ignore[misc]
    """Does to dense gradients [rows, dim] of replicated tables what the backward does to rows of other tables.

    A row counts as touched if any number of its gradient is not 0. State has the same names and shapes
    (``<table>.momentum1`` and so on, above), so that a checkpoint loads whether a table is replicated or cut. Gradients
    are forgotten once applied.

    Args:
        tables: ``<path>.<table>.weight`` to its parameter.

    Attributes:
        tables: the storage of each, over the parameter's memory.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], settings: TableOptimizer) -> None:
        self._settings = settings
        self.tables = {key: _over(key.split(".")[-2], weight, settings) for key, weight in tables.items()}
        state = {tables[key]: _named_state(table, settings) for key, table in self.tables.items()}
        super().__init__(tables, state, [{"params": list(tables.values()), "lr": settings.lr}])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Applies pending gradients.

        Raises:
            BadGradient: one is not finite; names table and row. Tables before it have been updated.
        """
        rate = next(iter(self.param_groups))["lr"]
        for key, weight in self.params.items():
            if weight.grad is not None:
                self._update(key, weight.grad, rate)
        # Only now: tables of one collection are slices of one tensor, whose gradient goes with the first one's.
        for weight in self.params.values():
            weight.grad = None

    def _update(self, key: str, gradient: Tensor, rate: float) -> None:
        table, state = self.tables[key], self.state[self.params[key]]
        rows = gradient.ne(0).any(1).nonzero()[:, 0]
        each = torch.arange(len(rows) + 1, device=rows.device)
        backend = pick_backend(table.device)
        found = backend.sort([table], Bags(rows, each, None, (0,), (len(rows),), Pooling.NONE))
        if self._settings.counts_steps:  # a checkpoint may have been loaded into it
            table.step = int(state[f"{table.name}.{STEP}"])
        table.advance()
        backend.update([table], found, gradient[rows], [self._settings.rule(rate, table.step)])
        if self._settings.counts_steps:
            state[f"{table.name}.{STEP}"].fill_(table.step)


def _over(name: str, weight: nn.Parameter, settings: TableOptimizer) -> FlatTable:
    rows, dim = weight.shape
    memory = weight.detach().as_subclass(Tensor)
    return FlatTable(
        name,
        rows,
        dim,
        scalar=settings.has_scalar,
        vectors=settings.vectors,
        weights=memory,
        device=weight.device,
    )


def _named_state(table: FlatTable, settings: TableOptimizer) -> dict[str, Tensor]:
    named = {f"{table.name}.{name}": v for name, v in zip(settings.vector_names, table.vectors, strict=True)}
    if settings.has_scalar:
        named[f"{table.name}.{settings.scalar_name}"] = table.scalar
    if settings.counts_steps:
        named[f"{table.name}.{STEP}"] = torch.zeros(())
    return named
