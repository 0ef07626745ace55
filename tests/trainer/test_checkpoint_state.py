"""Dense optimizer state through a checkpoint: bit-exact, also into an optimizer that has not stepped yet."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizerWrapper

from thresher.errors import CheckpointError
from thresher.trainer.checkpoint import CheckpointStore, LazyOptimizer

OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


class Net(nn.Module):
    """``late`` has no gradient before ``use_late``; ``late.extra`` shares its name's beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.late = nn.Module()
        self.late.weight = nn.Parameter(torch.ones(4))
        self.late.extra = nn.Module()
        self.late.extra.weight = nn.Parameter(torch.ones(1))
        self.use_late = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(self.first(x)))
        if self.use_late:
            y = y * self.late.weight
        return (y.sum(1) * self.late.extra.weight).square().mean()


def build(name: str, seed: int) -> tuple[Net, KeyedOptimizerWrapper]:
    torch.manual_seed(seed)
    net = Net()
    return net, KeyedOptimizerWrapper(dict(net.named_parameters()), OPTIMIZERS[name])


def train(net: Net, optimizer: KeyedOptimizerWrapper, steps: range) -> None:
    for step in steps:
        net.use_late = step >= 5
        optimizer.zero_grad()
        net(torch.randn(16, 6, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()


def state(net: Net, optimizer: KeyedOptimizerWrapper) -> dict[str, object]:
    return {"model": net, "dense_optimizer": LazyOptimizer(optimizer)}


def tensors(net: Net, optimizer: KeyedOptimizerWrapper) -> dict[str, Tensor]:
    found = dict(net.state_dict())
    for key, entries in optimizer.state_dict()["state"].items():
        found |= {f"{key}/{name}": value for name, value in entries.items()}
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("saved_at", [1, 3, 7])
def test_training_continues_bit_exact(tmp_path, name, saved_at):
    """With a parameter whose first gradient comes after the checkpoint (steps 1 and 3), and one with it before (7)."""
    net, optimizer = build(name, seed=0)
    train(net, optimizer, range(saved_at))
    CheckpointStore(tmp_path, 1).save(saved_at, state(net, optimizer), {})
    train(net, optimizer, range(saved_at, 10))
    other, fresh = build(name, seed=1)
    assert CheckpointStore(tmp_path, 1).restore(state(other, fresh)) is not None
    train(other, fresh, range(saved_at, 10))
    assert_same(tensors(net, optimizer), tensors(other, fresh))


def test_restoring_into_an_optimizer_that_has_stepped_replaces_its_state(tmp_path):
    net, optimizer = build("adam", seed=0)
    train(net, optimizer, range(3))
    CheckpointStore(tmp_path, 1).save(3, state(net, optimizer), {})
    before = {key: value.clone() for key, value in tensors(net, optimizer).items()}
    train(net, optimizer, range(3, 10))
    assert any(key.startswith("late.weight/") for key in tensors(net, optimizer))
    CheckpointStore(tmp_path, 1).restore(state(net, optimizer))
    assert_same(before, tensors(net, optimizer))


def test_a_refused_checkpoint_changes_neither_weights_nor_rates(tmp_path):
    net, optimizer = build("adamw", seed=0)
    train(net, optimizer, range(2))
    CheckpointStore(tmp_path, 1).save(2, state(net, optimizer), {})
    other, fresh = build("adamw", seed=1)
    other.more = nn.Linear(2, 2)
    weights = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has no 'model.more.weight', which this run needs"):
        CheckpointStore(tmp_path, 1).restore(state(other, fresh))
    assert_same(weights, dict(other.state_dict()))
    assert [group["lr"] for group in fresh.param_groups] == [0.1]
    assert all(param.grad is None for param in other.parameters())


def test_state_of_another_optimizer_is_refused(tmp_path: Path):
    net, optimizer = build("momentum", seed=0)
    train(net, optimizer, range(2))
    CheckpointStore(tmp_path, 1).save(2, state(net, optimizer), {})
    other, adam = build("adam", seed=0)
    with pytest.raises(
        CheckpointError, match=r"has no 'dense_optimizer.state.first.weight.step', which this run needs"
    ):
        CheckpointStore(tmp_path, 1).restore(state(other, adam))
