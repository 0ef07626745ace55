"""Batches as the ranks of a real run see them: of unequal sizes, with weights nobody asked for, several times a run."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from tests.multi.harness import run_ranks
from tests.multi.sharded_twin import SEED, Case, local_parts, plan_of, train
from tests.multi.twin import KEYS, Net, samples
from thresher.embeddings.init import init_tables
from thresher.embeddings.optimizers import TableOptimizer
from thresher.sharding.cuts import BAG_TYPES, ROW_TYPES
from thresher.sharding.model import ShardedModel, shard
from thresher.sharding.planner import make_plan

CPU = torch.device("cpu")
SIZES = (3, 7)


def _shard(kind: str, world: int, optimizer: str = "adagrad") -> ShardedModel:
    case = Case(kind, optimizer)
    return shard(Net(), plan_of(case, world, world), device=CPU, optimizer=case.table_optimizer, seed=SEED)


def unequal(rank: int, world: int, kinds: list[str]) -> list[tuple[str, Tensor, Tensor]]:
    """Forward and backward of a batch whose size differs between ranks; logits of the sharded and whole model."""
    sample = samples(1)[0]
    rows = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], sum(SIZES))
    own = replace(
        sample,
        ids={key: sample.ids[key][rows] for key in KEYS},
        weights={key: sample.weights[key][rows] for key in KEYS},
        labels=sample.labels[rows],
    )
    kjt, _ = own.part(0, 1)
    whole = Net("cpu")
    init_tables(whole, SEED)
    expected = whole(kjt).detach()
    found = []
    for kind in kinds:
        model = _shard(kind, world)
        logits = model.wrapped(kjt)
        if kind not in ROW_TYPES:  # gloo gathers gradients of cut rows in equal sizes only, and says so
            logits.sum().backward()
            model.step_tables()
        found.append((kind, logits.detach(), expected))
    return found


def rates(rank: int, world: int) -> list[bool]:
    """Whether tables move: at a rate set to almost nothing, at a real one, and after a step that only sets a rate."""
    model = _shard("mixed", world, "sgd")
    replicated = _shard("data_parallel", world, "sgd")
    return [_moves(model, lr) for lr in (1e-30, 0.1)] + [_moves(replicated, lr) for lr in (1e-30, 0.1)]


def _moves(model: ShardedModel, lr: float) -> bool:
    model.set_table_lr(lr)
    before = local_parts(model)
    kjt, _ = samples(1)[0].part(0, 1)
    model.wrapped(kjt).sum().backward()
    model.step_tables()
    model.set_table_lr(lr)
    after = local_parts(model)
    moved = [not torch.equal(a[2], b[2]) for path in before for a, b in zip(before[path], after[path], strict=True)]
    assert all(moved) or not any(moved)
    return all(moved)


def pending(rank: int, world: int) -> str:
    model = _shard("data_parallel", world)
    kjt, _ = samples(1)[0].part(0, 1)
    model.wrapped(kjt).sum().backward()
    try:
        model.wrapped(kjt)
    except RuntimeError as error:
        return str(error)
    return "no error"


def twice(rank: int, world: int) -> bool:
    """Whether two trainings give the same bits."""
    one, two = (train(rank, world, 2, Case("mixed", "sgd")) for _ in range(2))
    weights = [torch.equal(a[2], b[2]) for p in one.parts for a, b in zip(one.parts[p], two.parts[p], strict=True)]
    dense = [torch.equal(one.dense[name], two.dense[name]) for name in one.dense]
    return all(weights) and all(dense) and one.losses == two.losses


def first_and_later(rank: int, world: int) -> list[bool]:
    """Whether gradients of the same batch at the same weights have the same bits at every step, from the first on."""
    model = _shard("data_parallel", world)
    model.set_table_lr(1e-30)
    kjt, _ = samples(1)[0].part(rank, world)
    seen: list[list[Tensor]] = []
    for _ in range(3):
        parameters = [p for p in model.wrapped.parameters() if p.requires_grad and p.numel()]
        for parameter in parameters:
            parameter.grad = None
        model.wrapped(kjt).pow(2).sum().backward()
        seen.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    return [all(torch.equal(a, b) for a, b in zip(seen[0], later, strict=True)) for later in seen[1:]]


def narrow(rank: int, world: int) -> list[Tensor]:
    """Weights of tables of 1 and 10 columns, and what one SGD step on the sum of their vectors makes of them."""
    configs = [
        EmbeddingBagConfig(name=f"t{dim}", num_embeddings=6, embedding_dim=dim, feature_names=[f"f{dim}"])
        for dim in (1, 10)
    ]
    net = nn.ModuleDict({"bags": EmbeddingBagCollection(configs, device=torch.device("meta"))})
    optimizer = TableOptimizer(name="sgd", lr=0.5)
    plan = make_plan(net, world=world, local_world=world, device="cpu", optimizer=optimizer, default="data_parallel")
    model = shard(net, plan, device=CPU, optimizer=optimizer, seed=SEED)
    before = _rows_of(model)
    kjt = KeyedJaggedTensor(["f1", "f10"], torch.tensor([rank, 5, 5, 2]), lengths=torch.tensor([2, 2]))
    model.wrapped.module["bags"](kjt).values().sum().backward()
    model.step_tables()
    return [after - first for first, after in zip(before, _rows_of(model), strict=True)]


def _rows_of(model: ShardedModel) -> list[Tensor]:
    """[6, dim] of each table, narrowest first."""
    weights = [weight.detach().clone() for weight in model.wrapped.state_dict().values()]
    return sorted(weights, key=lambda weight: weight.shape[1])


def test_replicated_tables_of_any_width_train() -> None:
    one, ten = run_ranks(2, narrow, timeout_s=60)[0]
    half = 0.5 / 2  # the rate, and the mean over two ranks
    torch.testing.assert_close(one[:, 0], -half * torch.tensor([1.0, 1, 0, 0, 0, 2]))
    torch.testing.assert_close(ten, -half * torch.tensor([0.0, 0, 2, 0, 0, 2])[:, None].expand(6, 10))


def test_batches_of_unequal_size_pass_and_give_the_rows_their_own_logits() -> None:
    for rank in run_ranks(2, unequal, list(BAG_TYPES), timeout_s=120):
        assert [kind for kind, *_ in rank] == list(BAG_TYPES)
        for kind, logits, expected in rank:
            torch.testing.assert_close(logits, expected, atol=5e-6, rtol=0, msg=lambda m, k=kind: f"{k}: {m}")


def test_the_rate_of_tables_can_be_changed_and_applies_nothing_twice() -> None:
    assert run_ranks(2, rates, timeout_s=60) == [[False, True, False, True]] * 2


def test_forgetting_to_step_replicated_tables_is_an_error() -> None:
    assert "call step_tables()" in run_ranks(1, pending, timeout_s=60)[0]


def test_training_twice_gives_the_same_bits() -> None:
    assert run_ranks(4, twice, timeout_s=120, local_world=2) == [True] * 4


def test_gradients_have_the_same_bits_from_the_first_step_on() -> None:
    assert run_ranks(4, first_and_later, timeout_s=60) == [[True, True]] * 4
