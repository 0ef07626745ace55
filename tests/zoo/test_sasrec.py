"""SASRec: formula, causality, lengths, negatives, loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo.data import CPU, batch_of, doubled, gradients, rows_of, shop, slow_twin, table, with_ids, worst
from thresher.zoo.blocks.negatives import sample_negatives
from thresher.zoo.blocks.ragged import Grid
from thresher.zoo.blocks.transformer import Block
from thresher.zoo.sasrec.model import SasRecConfig

TOLERANCE = 1e-10


def loss_of_place(config: SasRecConfig, state: Tensor, items: Tensor, positive: int, negatives: list[int]) -> Tensor:
    """The loss at one place, by its definition."""
    score, others = state @ items[positive], [state @ items[n] for n in negatives]
    if config.loss == "bce":
        return -torch.log(torch.sigmoid(score)) - sum(torch.log(1 - torch.sigmoid(other)) for other in others)
    return -torch.log(torch.exp(score) / sum(torch.exp(value) for value in [score, *others]))


def encode_one(model: Any, ids: list[int], items: Tensor) -> Tensor:
    """[n, D] states of one history, head by head and place by place."""
    width, heads, n = items.shape[1], model.blocks[0].attention.heads, len(ids)
    ages = model.positions.table.weight
    values = [items[row] * width**0.5 + ages[n - 1 - i] for i, row in enumerate(ids)]
    for block in model.blocks:
        normal = [block.norms[0](v) for v in values]
        q, k, v = (block.attention.projections.weight[i * width : (i + 1) * width] for i in range(3))
        size, mixed = width // heads, []
        for i in range(n):
            parts = []
            for h in range(heads):
                cut = slice(h * size, (h + 1) * size)
                scores = torch.stack([(q @ normal[i])[cut] @ (k @ normal[j])[cut] / size**0.5 for j in range(i + 1)])
                weights = torch.softmax(scores, 0)
                parts.append(sum(weights[j] * (v @ normal[j])[cut] for j in range(i + 1)))
            mixed.append(values[i] + torch.cat(parts))
        first, last = block.network[0], block.network[3]
        values = [
            x + last.weight @ (first.weight @ block.norms[1](x) + first.bias).clamp(min=0) + last.bias for x in mixed
        ]
    return torch.stack([model.norm(v) for v in values])


@pytest.mark.parametrize("loss", ["bce", "sampled_softmax"])
@pytest.mark.parametrize("places", ["all", "last"])
def test_states_and_loss_equal_their_definition(loss: str, places: str) -> None:
    schema = shop()
    torch.manual_seed(0)
    config = SasRecConfig(dim=4, heads=2, layers=2, loss=loss, places=places, negatives=2, max_length=4, seed=5)
    model: Any = slow_twin(config.build(schema, CPU)).eval()
    batch = doubled(batch_of(schema, 6, seed=3))
    items = table(model, "items")
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch.size):
        ids = rows_of(batch, "history", b)[-4:]
        following = [*ids[1:], *rows_of(batch, "item", b)] if ids else []
        states = encode_one(model, ids, items) if ids else torch.zeros(0, 4)
        here = range(len(ids)) if places == "all" else range(max(len(ids) - 1, 0), len(ids))
        losses = []
        for i in here:
            counter = tuple(torch.tensor([int(c)]) for c in (batch.index[b], batch.epoch[b], i))
            drawn = sample_negatives(torch.tensor([following[i]]), counter, 5, 2, range(2, 17))[0].tolist()
            if following[i] >= 2:
                losses.append(loss_of_place(config, states[i], items, following[i], drawn))
        if losses:
            total = total + batch.weight[b] * torch.stack(losses).mean()
    total = total / batch.size
    given = model.loss(model(batch), batch)
    assert abs(given.item() - total.item()) <= TOLERANCE
    assert worst(gradients(model, given), gradients(model, total)) <= TOLERANCE
    queries, rows = model.queries(batch), torch.tensor([3, 9, 3])
    for b in range(batch.size):
        ids = rows_of(batch, "history", b)[-4:]
        expected = encode_one(model, ids, items)[-1] if ids else torch.zeros(4, dtype=torch.float64)
        assert float((queries[b] - expected).detach().abs().max()) <= TOLERANCE
    assert torch.equal(model.items(rows), items[rows])
    assert model.target(batch).tolist() == [rows_of(batch, "item", b)[0] for b in range(batch.size)]


def test_a_later_item_leaves_earlier_states_bit_equal() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 0.0)
    grid = Grid(torch.cat([torch.arange(40), torch.arange(40, 80)]), 2, 40)
    values = torch.randn(80, 8)
    changed = values.clone()
    changed[65:] = torch.randn(15, 8)
    before, after = block(values, grid), block(changed, grid)
    assert torch.equal(before[:65], after[:65])
    assert not (before[65:] == after[65:]).any()


def test_padding_has_no_influence_and_no_gradient() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 0.0)
    values = torch.randn(5, 8, requires_grad=True)
    tight = block(values, Grid(torch.tensor([0, 1, 2, 3, 4]), 1, 5))
    wide = block(values, Grid(torch.tensor([20, 21, 22, 23, 24]), 3, 20))
    assert torch.allclose(tight, wide, atol=1e-6)
    slopes = [torch.autograd.grad(states.square().sum(), values)[0] for states in (tight, wide)]
    assert torch.allclose(slopes[0], slopes[1], atol=1e-4)


def test_long_histories_are_cut_to_the_newest_and_neighbours_do_not_matter() -> None:
    schema = shop()
    torch.manual_seed(0)
    model = SasRecConfig(dim=8, max_length=3).build(schema, CPU).eval()
    batch = batch_of(schema, 2)
    long = model.queries(with_ids(batch, "history", [[2, 3, 4, 5, 6], [7]]))
    cut = model.queries(with_ids(batch, "history", [[4, 5, 6], [7, 8, 9]]))
    assert torch.equal(long[0], cut[0])
    assert not torch.equal(long[1], cut[1])


def test_empty_histories_have_zero_queries_and_no_loss() -> None:
    schema = shop()
    model = SasRecConfig(dim=8).build(schema, CPU)
    batch = batch_of(schema, 3, empty=True)
    loss = model.loss(model(batch), batch)
    assert loss.item() == 0
    assert worst(gradients(model, loss), {n: torch.zeros_like(p) for n, p in model.named_parameters()}) == 0
    assert torch.equal(model.queries(batch), torch.zeros(3, 8))


def counters(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(count), torch.zeros(count, dtype=torch.int64), torch.arange(count) % 7


def test_negatives_are_items_other_than_the_positive_and_uniform() -> None:
    positives = torch.full((70_000,), 4)
    drawn = sample_negatives(positives, counters(70_000), 0, 2, range(2, 9))
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert counts[[0, 1, 4]].tolist() == [0, 0, 0]
    expected = 140_000 / 6
    # Chi-square of 5 degrees of freedom: 99.99 % lie below 25.7.
    assert float(((counts[[2, 3, 5, 6, 7, 8]] - expected) ** 2 / expected).sum()) < 25.7


@pytest.mark.parametrize("positive", [2, 8])
def test_the_first_and_the_last_item_are_never_their_own_negative(positive: int) -> None:
    drawn = sample_negatives(torch.full((500,), positive), counters(500), 1, 3, range(2, 9))
    assert sorted(set(drawn.flatten().tolist())) == [row for row in range(2, 9) if row != positive]


def test_negatives_depend_on_seed_sample_epoch_place_and_nothing_else() -> None:
    index, epoch, place = counters(64)
    positives = torch.zeros(64, dtype=torch.int64)
    items = range(100_000)
    base = sample_negatives(positives, (index, epoch, place), 3, 4, items)
    order = torch.randperm(64)
    shuffled = sample_negatives(positives, (index[order], epoch, place[order]), 3, 4, items)
    assert torch.equal(base[order], shuffled)
    for changed in (
        sample_negatives(positives, (index, epoch, place), 4, 4, items),
        sample_negatives(positives, (index + 1, epoch, place), 3, 4, items),
        sample_negatives(positives, (index, epoch + 1, place), 3, 4, items),
        sample_negatives(positives, (index, epoch, place + 1), 3, 4, items),
    ):
        assert (changed == base).float().mean() < 0.01
    assert len(set(base.flatten().tolist())) > 250


def test_seeds_and_indices_do_not_alias() -> None:
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    items = range(1 << 40)
    assert sample_negatives(zero, (one, zero, zero), 0, 1, items) != sample_negatives(
        zero, (zero, zero, zero), 1, 1, items
    )


def test_a_batch_split_in_two_has_the_same_loss() -> None:
    schema = shop()
    model = SasRecConfig(dim=8, dropout=0.0).build(schema, CPU)
    batch = batch_of(schema, 8)
    histories = [rows_of(batch, "history", b) for b in range(8)]
    whole = model.loss(model(batch), batch)
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        small = batch_of(schema, 4)
        items = [rows_of(batch, "item", b) for b in range(8)][part]
        small = with_ids(small, "history", histories[part])
        small = with_ids(small, "item", items)
        small = replace(small, index=batch.index[part], weight=batch.weight[part])
        halves.append(model.loss(model(small), small))
    assert torch.allclose(whole, torch.stack(halves).mean(), atol=1e-6)
