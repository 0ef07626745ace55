"""Modules for one process: TorchRec's and torch's call, updates within the backward, tiers under a budget."""

import io

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.modules.embedding_configs import DataType

from tests.embeddings.backends import assert_same_tables
from thresher.embeddings.init import init_tables
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.module import TieredEmbeddingBag, TieredEmbeddingBagCollection
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import BadIds, CheckpointError, ConfigError

SGD = TableOptimizer(name="sgd", lr=1.0)
TIERS = TierConfig(budget="70%", flat_below_bytes=0, rebalance_every=4, sweep_every=2)


def configs() -> list[EmbeddingBagConfig]:
    """Two poolings in turn, a shared table, a feature of two tables, keys in another order than the batch's."""
    mean = PoolingType.MEAN
    return [
        EmbeddingBagConfig(name="users", num_embeddings=50, embedding_dim=8, feature_names=["u"]),
        EmbeddingBagConfig(name="goods", num_embeddings=30, embedding_dim=16, feature_names=["v"], pooling=mean),
        EmbeddingBagConfig(name="wide", num_embeddings=50, embedding_dim=24, feature_names=["u", "w", "i"]),
    ]


def batch(seed: int, weighted: bool = False) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (4 * 5,), generator=generator)
    values = torch.randint(0, 30, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(len(values), generator=generator) if weighted else None
    return KeyedJaggedTensor(["i", "u", "v", "w"], values, weights, lengths=lengths)


def stock(tables: list[EmbeddingBagConfig], weighted: bool) -> EmbeddingBagCollection:
    model = torch.nn.ModuleDict({"bags": EmbeddingBagCollection(tables=tables, is_weighted=weighted)})
    init_tables(model, seed=3)
    return model["bags"]


@pytest.mark.parametrize("weighted", [False, True])
def test_without_a_budget_it_is_torchrecs_collection(weighted: bool) -> None:
    """Outputs and SGD over five steps; an unweighted collection ignores the weights of a batch."""
    tables = configs()
    for config in tables:  # torch has no weighted mean
        config.pooling = PoolingType.SUM if weighted else config.pooling
    ours = TieredEmbeddingBagCollection(tables, SGD, is_weighted=weighted, seed=3, path="bags")
    theirs = stock(tables, weighted)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    for step in range(5):
        features = batch(step, weighted=True)
        mine, other = ours(features), theirs(features)
        assert mine.keys() == other.keys() == ["u@users", "v", "u@wide", "w", "i"]
        assert mine.length_per_key() == other.length_per_key()
        torch.testing.assert_close(mine.values(), other.values(), rtol=1e-5, atol=1e-5)
        grad = torch.randn(mine.values().shape, generator=torch.Generator().manual_seed(step))
        mine.values().backward(grad)
        optimizer.zero_grad()
        other.values().backward(grad)
        optimizer.step()
    assert ours.ledger() is None


@pytest.mark.parametrize("pooling", list(Pooling))
def test_one_table_is_called_as_torchs(pooling: Pooling) -> None:
    ours = TieredEmbeddingBag(40, 6, SGD, pooling=pooling, seed=1)
    table = ours.rows.tables[0].weights.clone().requires_grad_()
    ids, offsets = torch.tensor([1, 7, 7, 39, 0]), torch.tensor([0, 0, 3])
    functional = torch.nn.functional
    if pooling is Pooling.NONE:
        theirs = functional.embedding(ids, table)
    else:
        theirs = functional.embedding_bag(ids, table, offsets, mode=pooling.value)
        rows = functional.embedding_bag(ids[:4].view(2, 2), table, mode=pooling.value)
        torch.testing.assert_close(ours(ids[:4].view(2, 2)), rows, rtol=1e-5, atol=1e-5)
    mine = ours(ids, offsets)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    grad = torch.randn(mine.shape)
    mine.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(ours.rows.tables[0].weights, table.detach() - table.grad, rtol=1e-5, atol=1e-5)


def test_a_bag_for_each_id_where_there_are_no_offsets() -> None:
    ours = TieredEmbeddingBag(40, 6)
    assert torch.equal(ours(torch.tensor([3, 5])), ours.rows.tables[0].weights[[3, 5]])


def trained(module: TieredEmbeddingBagCollection, steps: range) -> None:
    for step in steps:
        module.rows.set_labels(torch.arange(5) % 2)
        module(batch(step)).values().square().sum().backward()


def test_tiers_keep_within_the_budget_while_training() -> None:
    module = TieredEmbeddingBagCollection(configs(), TableOptimizer(), TIERS, seed=1)
    trained(module, range(9))
    ledger = module.ledger()
    assert ledger.moves.promoted > 0
    assert ledger.rows[Tier.FP32] > 0
    module.rows.controller.rebalance()
    assert 0 < module.ledger().live_bytes <= ledger.budget_bytes


def test_rows_change_their_tiers_only_between_steps() -> None:
    """Two lookups and two backwards are one step; evaluation ends none."""
    module = TieredEmbeddingBagCollection(configs(), TableOptimizer(), TIERS)
    losses = [module(batch(step)).values().sum() for step in range(2)]
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        module(batch(0))
    assert module.rows.controller.step == 0
    module(batch(1))
    assert module.rows.controller.step == 1
    module(batch(1))
    assert module.rows.controller.step == 1


def test_labels_weigh_the_rows_of_their_samples() -> None:
    module = TieredEmbeddingBag(10, 8, tiers=TierConfig(budget="90%", flat_below_bytes=0, positive_weight=3.0))
    module.rows.set_labels(torch.tensor([1.0, 0.0]))
    module(torch.tensor([4, 5]), torch.tensor([0, 1])).sum().backward()
    priority = module.rows.tables[0].stat[:, 1]
    assert priority[4] == 3 * priority[5] > 0


def test_the_learning_rate_changes_from_the_next_backward_on() -> None:
    module = TieredEmbeddingBag(10, 4, SGD)
    before = module.rows.tables[0].weights.clone()
    module.rows.set_lr(0.25)
    module(torch.tensor([2])).sum().backward()
    torch.testing.assert_close(before[2] - module.rows.tables[0].weights[2], torch.full((4,), 0.25))


@pytest.mark.parametrize("tiers", [TierConfig(), TIERS], ids=["flat", "tiers"])
@pytest.mark.parametrize("name", ["sgd", "rowwise_adam", "ftrl"])
def test_a_run_goes_on_from_its_state_dict_as_if_never_interrupted(name: str, tiers: TierConfig) -> None:
    whole, first, second = (
        TieredEmbeddingBagCollection(configs(), TableOptimizer(name=name), tiers, seed=1) for _ in range(3)
    )
    trained(whole, range(9))
    trained(first, range(5))
    # The fifth step is not ended yet: the first lookup after the resume does it.
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    trained(second, range(5, 9))
    for ours, theirs in zip(second.rows.tables, whole.rows.tables, strict=True):
        assert_same_tables(ours, theirs)
    assert second.ledger() == whole.ledger() or tiers.enabled


def test_a_state_dict_of_another_table_is_refused() -> None:
    saved = TieredEmbeddingBag(10, 4).state_dict()
    with pytest.raises(
        CheckpointError, match=r"table 'table': a table of shape \[10, 4\].* this one has shape \[11, 4\]"
    ):
        TieredEmbeddingBag(11, 4).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="same rows, dim, optimizer and tiers"):
        TieredEmbeddingBag(10, 4, TableOptimizer(name="adam")).load_state_dict(saved)


def test_tables_with_what_is_not_done_here_are_refused() -> None:
    half = EmbeddingBagConfig(name="h", num_embeddings=5, embedding_dim=4, feature_names=["h"], data_type=DataType.FP16)
    with pytest.raises(ConfigError, match="table 'h' has its own type FP16"):
        TieredEmbeddingBagCollection([half])
    started = EmbeddingBagConfig(name="s", num_embeddings=5, embedding_dim=4, feature_names=["s"], weight_init_max=0.5)
    with pytest.raises(ConfigError, match=r"table 's' has its own initial values.*init_scale"):
        TieredEmbeddingBagCollection([started])


def test_ids_on_another_device_are_refused() -> None:
    with pytest.raises(BadIds, match="ids are on meta, their tables on cpu"):
        TieredEmbeddingBag(10, 4)(torch.zeros(2, dtype=torch.int64, device="meta"), torch.tensor([0]))


def test_features_of_different_batch_sizes_are_refused() -> None:
    module = TieredEmbeddingBagCollection(configs()[:1])
    ragged = KeyedJaggedTensor(["u"], torch.tensor([1]), lengths=torch.tensor([1]), stride_per_key_per_rank=[[1]])
    with pytest.raises(BadIds, match="different numbers of bags"):
        module(ragged)
