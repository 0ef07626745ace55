"""Row optimizers: how the touched rows of a table are updated, inside the backward or from dense gradients.

For a row w with gradient g of D columns, learning rate a:

    sgd               w <- w - a g
    adagrad           s <- s + g^2 (element by element),  w <- w - a g / (sqrt(s) + eps)     (Duchi et al., 2011)
    rowwise_adagrad   s <- s + mean(g^2) (one s a row),   w <- w - a g / (sqrt(s) + eps)     (FBGEMM, TorchRec)

g = 0 leaves w and s as they are in all three, so a dense update of a whole table equals the update of touched rows.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from pydantic import Field
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from thresher.embeddings.kernels.rules import HAS_SCALAR, NEVER, VECTORS, RowOptimizerName, UpdateRule
from thresher.embeddings.tables import FLOAT_BYTES
from thresher.settings import Settings

Momentum = Annotated[float, Field(ge=0, lt=1)]


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

    @property
    def has_scalar(self) -> bool:
        """Whether the optimizer keeps one number a row."""
        return self.name in HAS_SCALAR

    @property
    def vectors(self) -> int:
        """How many numbers the optimizer keeps for each weight."""
        return VECTORS[self.name]

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
    """TorchRec's ``fused_params``. Ids outside the table stop the run; FBGEMM's default reads row 0 for them."""
    kinds = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }
    params = {"optimizer": kinds[optimizer.name], "learning_rate": optimizer.lr}
    return params | {"eps": optimizer.eps, "bounds_check_mode": BoundsCheckMode.FATAL}


class ReplicatedTables(KeyedOptimizer):  # type: ignore[misc]
    """Does to dense gradients [rows, dim] of replicated tables what the fused optimizer does to rows.

    Its state has the fused one's names and shapes (``<table>.momentum1``: [rows] or [rows, dim]), so that a checkpoint
    loads whether a table is replicated or cut. Gradients are forgotten once applied.

    Args:
        tables: ``<path>.<table>.weight`` to its parameter.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], settings: TableOptimizer) -> None:
        self._settings = settings
        state = {weight: self._fresh(key.split(".")[-2], weight) for key, weight in tables.items()}
        super().__init__(tables, state, [{"params": list(tables.values()), "lr": settings.lr}])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Applies pending gradients."""
        rate = next(iter(self.param_groups))["lr"]
        for weight in self.params.values():
            if weight.grad is not None:
                self._update(weight, weight.grad, rate)
        # Only now: tables of one collection are slices of one tensor, whose gradient goes with the first one's.
        for weight in self.params.values():
            weight.grad = None

    def _fresh(self, table: str, weight: nn.Parameter) -> dict[str, Tensor]:
        match self._settings.name:
            case "sgd":
                return {}
            case "adagrad":
                return {f"{table}.momentum1": torch.zeros_like(weight)}
            case "rowwise_adagrad":
                return {f"{table}.momentum1": torch.zeros_like(weight[:, 0])}

    def _update(self, weight: nn.Parameter, gradient: Tensor, rate: float) -> None:
        if self._settings.name == "sgd":
            weight.sub_(gradient, alpha=rate)
            return
        (momentum,) = self.state[weight].values()
        square = gradient.square()
        if self._settings.name == "adagrad":
            momentum.add_(square)
            scale = momentum
        else:
            momentum.add_(square.mean(1))
            scale = momentum.unsqueeze(1)
        weight.addcdiv_(gradient, scale.sqrt().add_(self._settings.eps), value=-rate)
