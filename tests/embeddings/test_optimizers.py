"""Row optimizers: against dense formulas and torch's own, on touched rows only; and what FBGEMM gets wrong."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from tests.embeddings.dense import Dense
from thresher.embeddings.group import TableGroup
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.kernels.reference import Reference
from thresher.embeddings.optimizers import ReplicatedTables, TableOptimizer, fused_params
from thresher.embeddings.rows.flat import FlatTable
from thresher.errors import BadGradient

NAMES = ("sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam", "ftrl")
DECAYS = ((0.0, "l2"), (0.1, "l2"), (0.1, "decoupled"))
ROWS, DIM, STEPS = 6, 20, 10


def optimizer(name: str, weight_decay: float = 0.0, decay: str = "l2") -> TableOptimizer:
    return TableOptimizer(
        name=name,
        lr=0.3,
        eps=1e-3,
        betas=(0.8, 0.9),
        l1=0.05 if name == "ftrl" else 0.0,
        l2=0.1 if name == "ftrl" else 0.0,
        weight_decay=weight_decay,
        decay=decay,
    )


def start() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))


def gradients() -> list[dict[int, torch.Tensor]]:
    """For each step the gradients of some rows; row 5 is never touched."""
    generator = torch.Generator().manual_seed(1)
    return [{row: torch.randn(DIM, generator=generator) for row in {step % 5, step % 3, 4}} for step in range(STEPS)]


@pytest.mark.parametrize(("weight_decay", "decay"), DECAYS)
@pytest.mark.parametrize("name", NAMES)
def test_the_backward_follows_the_formula(name: str, weight_decay: float, decay: str) -> None:
    settings = optimizer(name, weight_decay, decay)
    table = FlatTable("t", ROWS, DIM, scalar=settings.has_scalar, vectors=settings.vectors, weights=start())
    group = TableGroup([table], [0], Pooling.SUM, settings, Reference())
    expected = Dense(start().double().numpy(), settings)
    for step in gradients():
        ids = torch.tensor(sorted(step))
        output = group(ids, torch.arange(len(ids) + 1))
        output.backward(torch.stack([step[row] for row in sorted(step)]))
        expected.step({row: g.double().numpy() for row, g in step.items()}, settings.lr)
    np.testing.assert_allclose(table.weights.numpy(), expected.x, rtol=1e-5, atol=1e-5)
    assert torch.equal(table.weights[5], start()[5])


@pytest.mark.parametrize(("weight_decay", "decay"), DECAYS)
@pytest.mark.parametrize("name", NAMES)
def test_dense_gradients_of_replicated_tables_follow_it_too(name: str, weight_decay: float, decay: str) -> None:
    settings = optimizer(name, weight_decay, decay)
    weight = torch.nn.Parameter(start())
    replicated = ReplicatedTables({"bags.t.weight": weight}, settings)
    expected = Dense(start().double().numpy(), settings)
    for step in gradients():
        weight.grad = torch.zeros(ROWS, DIM)
        for row, g in step.items():
            weight.grad[row] = g
        replicated.step()
        expected.step({row: g.double().numpy() for row, g in step.items()}, settings.lr)
    np.testing.assert_allclose(weight.detach().numpy(), expected.x, rtol=1e-5, atol=1e-5)
    assert torch.equal(weight.detach()[5], start()[5])
    assert weight.grad is None


@pytest.mark.parametrize(
    ("settings", "torchs"),
    [
        (optimizer("sgd", 0.1), lambda w: torch.optim.SGD(w, lr=0.3, weight_decay=0.1)),
        (optimizer("adagrad", 0.1), lambda w: torch.optim.Adagrad(w, lr=0.3, eps=1e-3, weight_decay=0.1)),
        (optimizer("adam", 0.1), lambda w: torch.optim.Adam(w, 0.3, (0.8, 0.9), 1e-3, weight_decay=0.1)),
        (
            optimizer("adam", 0.1, "decoupled"),
            lambda w: torch.optim.AdamW(w, 0.3, (0.8, 0.9), 1e-3, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "adagrad", "adam", "adamw"],
)
def test_where_all_rows_are_touched_torchs_optimizers_agree(
    settings: TableOptimizer, torchs: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
) -> None:
    ours, theirs = torch.nn.Parameter(start()), torch.nn.Parameter(start())
    replicated, stock = ReplicatedTables({"bags.t.weight": ours}, settings), torchs([theirs])
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        theirs.grad = torch.randn(ROWS, DIM, generator=generator)
        ours.grad = theirs.grad.clone()
        replicated.step()
        stock.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_that_is_loaded_goes_on_where_it_was_saved(name: str) -> None:
    settings, generator = optimizer(name), torch.Generator().manual_seed(3)
    steps = [torch.randn(ROWS, DIM, generator=generator) for _ in range(4)]
    first = torch.nn.Parameter(start())
    before = ReplicatedTables({"bags.t.weight": first}, settings)
    _apply(before, first, steps[:2])
    saved = copy.deepcopy(before.state_dict())
    second = torch.nn.Parameter(first.detach().clone())
    after = ReplicatedTables({"bags.t.weight": second}, settings)
    after.load_state_dict(saved)
    _apply(before, first, steps[2:])
    _apply(after, second, steps[2:])
    assert torch.equal(first, second)


def _apply(replicated: ReplicatedTables, weight: torch.nn.Parameter, steps: list[torch.Tensor]) -> None:
    for gradient in steps:
        weight.grad = gradient.clone()
        replicated.step()


def test_state_is_named_as_torchrec_names_it() -> None:
    shapes = {}
    for name in NAMES:
        state = ReplicatedTables({"bags.t.weight": torch.nn.Parameter(start())}, optimizer(name)).state_dict()["state"]
        shapes[name] = {key: tuple(value.shape) for key, value in state["bags.t.weight"].items()}
    matrix, vector = (ROWS, DIM), (ROWS,)
    assert shapes == {
        "sgd": {},
        "adagrad": {"t.momentum1": matrix},
        "rowwise_adagrad": {"t.momentum1": vector},
        "adam": {"t.momentum1": matrix, "t.exp_avg_sq": matrix, "t.step": ()},
        "rowwise_adam": {"t.momentum1": matrix, "t.exp_avg_sq": vector, "t.step": ()},
        "ftrl": {"t.z": matrix, "t.n": matrix},
    }


def test_a_gradient_that_is_not_finite_stops_the_step() -> None:
    weight = torch.nn.Parameter(start())
    weight.grad = torch.zeros(ROWS, DIM)
    weight.grad[3, 7] = float("nan")
    with pytest.raises(BadGradient, match=r"table 't': the gradient of row 3 is not finite"):
        ReplicatedTables({"bags.t.weight": weight}, TableOptimizer()).step()
    assert torch.equal(weight.detach(), start())


def test_state_is_counted() -> None:
    sizes = {name: TableOptimizer(name=name).state_bytes(10, 8) for name in NAMES}
    assert sizes == {
        "sgd": 0,
        "adagrad": 320,
        "rowwise_adagrad": 40,
        "adam": 640,
        "rowwise_adam": 360,
        "ftrl": 640,
    }


def test_fused_parameters_are_those_of_fbgemm_and_stop_at_ids_out_of_range() -> None:
    common = {"learning_rate": 0.3, "eps": 1e-3, "bounds_check_mode": BoundsCheckMode.FATAL}
    decayed = {"weight_decay": 0.1, "weight_decay_mode": WeightDecayMode.DECOUPLE}
    assert fused_params(optimizer("sgd")) == common | {"optimizer": EmbOptimType.EXACT_SGD}
    assert fused_params(optimizer("rowwise_adagrad", 0.1, "decoupled")) == common | decayed | {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD
    }
    assert fused_params(optimizer("rowwise_adam")) == common | {
        "optimizer": EmbOptimType.PARTIAL_ROWWISE_ADAM,
        "beta1": 0.8,
        "beta2": 0.9,
    }
    l2 = fused_params(optimizer("rowwise_adagrad", 0.1))
    assert l2["weight_decay_mode"] is WeightDecayMode.L2
    assert fused_params(optimizer("adam", 0.1, "decoupled"))["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "settings",
    [optimizer("ftrl"), optimizer("sgd", 0.1), optimizer("adagrad", 0.1, "decoupled"), optimizer("adam", 0.1, "l2")],
    ids=["ftrl", "sgd", "adagrad", "adam"],
)
def test_what_fbgemm_cannot_do_is_not_left_to_it(settings: TableOptimizer) -> None:
    assert fused_params(settings) == {}


def test_fbgemm_ignores_weight_decay_on_cpu_where_ours_heeds_it() -> None:
    """Fails once FBGEMM mends it."""
    assert torch.equal(_fbgemms(weight_decay=0.0), _fbgemms(weight_decay=0.5))
    settings = TableOptimizer(lr=0.1, weight_decay=0.5)
    table = FlatTable("t", 5, 4, scalar=True, vectors=0, weights=torch.ones(5, 4))
    group = TableGroup([table], [0], Pooling.SUM, settings, Reference())
    expected = Dense(np.ones((5, 4)), settings)
    for _ in range(3):
        group(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3])).sum().backward()
        expected.step({0: np.ones(4), 1: 2 * np.ones(4)}, 0.1)
    np.testing.assert_allclose(table.weights.numpy(), expected.x, rtol=1e-5)
    assert np.abs(_fbgemms(weight_decay=0.5).numpy() - expected.x).max() > 1e-3


def _fbgemms(weight_decay: float) -> torch.Tensor:
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
