"""Row optimizers: the dense equivalents against their formulas, and what FBGEMM gets wrong."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from thresher.embeddings.optimizers import ReplicatedTables, TableOptimizer, fused_params
from thresher.errors import ConfigError
from thresher.settings import parse


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad"])
def test_dense_gradients_update_touched_rows_by_the_formula_and_leave_others(name: str) -> None:
    settings = TableOptimizer(name=name, lr=0.3, eps=1e-3)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    expected, state = weight.detach().clone(), torch.zeros(6, 4)
    optimizer = ReplicatedTables({"bags.t.weight": weight}, settings)
    for step in range(3):
        gradient = torch.randn(6, 4, generator=generator)
        gradient[step + 2 :] = 0
        weight.grad = gradient.clone()
        optimizer.step()
        if name == "sgd":
            expected -= 0.3 * gradient
            continue
        state += gradient**2 if name == "adagrad" else (gradient**2).mean(1, keepdim=True)
        expected -= 0.3 * gradient / (state.sqrt() + 1e-3)
    torch.testing.assert_close(weight.detach(), expected)
    untouched = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))[4:]
    assert torch.equal(weight.detach()[4:], untouched)


def test_state_is_counted() -> None:
    sizes = {name: TableOptimizer(name=name).state_bytes(10, 8) for name in ("sgd", "adagrad", "rowwise_adagrad")}
    assert sizes == {"sgd": 0, "adagrad": 320, "rowwise_adagrad": 40}


def test_fused_parameters_are_those_of_fbgemm_and_stop_at_ids_out_of_range() -> None:
    assert fused_params(TableOptimizer(lr=0.5, eps=1e-4)) == {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": 0.5,
        "eps": 1e-4,
        "bounds_check_mode": BoundsCheckMode.FATAL,
    }


def test_weight_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match="FBGEMM's CPU kernel ignores it"):
        parse(TableOptimizer, {"weight_decay": 0.01}, "run.yaml: optim.tables")


def test_fbgemm_still_ignores_weight_decay_on_cpu() -> None:
    """The reason for the refusal; once this fails, weight decay can be offered."""
    assert torch.equal(_trained(weight_decay=0.0), _trained(weight_decay=0.5))


def _trained(weight_decay: float) -> torch.Tensor:
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(5, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        weight_decay=weight_decay,
        weight_decay_mode=WeightDecayMode.L2,
    )
    (weight,) = tables.split_embedding_weights()
    weight.fill_(1.0)
    for _ in range(3):
        tables(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3])).sum().backward()
    return weight.clone()
