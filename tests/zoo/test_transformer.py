"""The transformer: sequences, layers by their definition, the whole model against its cut into stages."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from torchrec import JaggedTensor, KeyedJaggedTensor

from tests.zoo.data import CPU, batch_of, doubled, gradients, shop
from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.errors import ConfigError, SchemaError
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.runtime.stage import build_parts
from thresher.pipeline.schedule.build import build_schedule
from thresher.trainer.model import Retriever
from thresher.trainer.pipelined.cut import PaddedCutter
from thresher.zoo.transformer.config import TransformerConfig
from thresher.zoo.transformer.rotary import rotate

TOKENS = Schema.model_validate(
    {
        "name": "text",
        "tables": [{"name": "token", "rows": 11, "ids": "index"}],
        "features": [{"kind": "sequence", "name": "text", "table": "token", "max_length": 9}],
    }
)
KINDS: dict[str, dict[str, Any]] = {
    "grouped queries, swiglu": {"heads": 4, "kv_heads": 2, "activation": "swiglu"},
    "learned positions, layer norm, tied": {"positions": "learned", "norm": "layer", "tied": True},
    "pointwise": {"attention": "pointwise", "positions": "none", "distances": 4},
    "pointwise with times and rotary": {"attention": "pointwise", "times": "dwell"},
}


def text(*rows: list[int], schema: Schema = TOKENS) -> Batch:
    """A batch of token sequences."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([token for row in rows for token in row])
    batch = batch_of(schema, len(rows))
    return replace(batch, sparse=KeyedJaggedTensor(["text"], ids, lengths=lengths))


def items(schema: Schema, histories: list[list[int]], targets: list[list[int]], **side: list[float]) -> Batch:
    """A batch of ``shop`` with the given histories and next items."""
    batch = batch_of(schema, len(histories))
    parts = batch.sparse.to_dict()
    for key, rows in (("history", histories), ("item", targets)):
        ids = torch.tensor([row for part in rows for row in part], dtype=torch.int64)
        parts[key] = JaggedTensor(ids, lengths=torch.tensor([len(part) for part in rows]))
    sparse = KeyedJaggedTensor(
        list(parts),
        torch.cat([part.values() for part in parts.values()]),
        lengths=torch.cat([part.lengths() for part in parts.values()]),
    )
    lengths = torch.tensor([len(part) for part in histories])
    given = {f"history.{key}": JaggedTensor(torch.tensor(values), lengths=lengths) for key, values in side.items()}
    return replace(batch, sparse=sparse, side=batch.side | given)


def build(config: TransformerConfig, schema: Schema) -> Any:
    torch.manual_seed(3)
    return config.build(schema, CPU)


def test_tokens_predict_the_next_and_the_last_only_is_predicted() -> None:
    batch = text([1, 2, 3, 4], [5], [6, 7])
    sequences = TransformerConfig().sequencer(TOKENS).sequences(batch)
    assert sequences.layout.tokens == 8
    assert sequences.inputs[:, :4].tolist() == [[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0]]
    assert sequences.targets[:, :4].tolist() == [[2, 3, 4, 0], [0, 0, 0, 0], [7, 0, 0, 0]]
    thirds = [1 / 3] * 3
    shares = torch.tensor([[*thirds, 0], [0] * 4, [1, 0, 0, 0]])
    assert torch.allclose(sequences.weights[:, :4], shares * batch.weight.unsqueeze(1))


def test_items_predict_the_next_and_the_newest_the_target() -> None:
    schema = shop()
    sequencer = TransformerConfig(max_length=3).sequencer(schema)
    batch = items(schema, [[4, 5, 6, 7], [8], [], [9, 10]], [[3], [2], [5], []])
    sequences = sequencer.sequences(batch, per_token=True)
    assert sequences.inputs.tolist() == [[5, 6, 7], [8, 2, 0], [5, 0, 0], [9, 10, 0]]
    assert sequences.targets.tolist() == [[6, 7, 3], [2, 0, 0], [0, 0, 0], [10, 0, 0]]
    counted = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0]])
    assert torch.equal(sequences.weights, counted * batch.weight.unsqueeze(1))
    assert sequencer.last(batch).tolist() == [2, 0, -1, 1]
    assert sequencer.target(batch).tolist() == [3, 2, 5, 0]


def test_targets_that_are_no_items_do_not_count() -> None:
    schema = shop()
    batch = items(schema, [[4, 1, 6], [4, 0]], [[1], [7]])
    weights = TransformerConfig().sequencer(schema).sequences(batch, per_token=True).weights
    assert (weights > 0).tolist() == [[False, True, *[False] * 4], [False, True, *[False] * 4]]


def test_the_last_place_alone_is_trained_on_demand() -> None:
    schema = shop()
    batch = items(schema, [[4, 5, 6], [7], [8, 9]], [[3], [2], []])
    weights = TransformerConfig(places="last").sequencer(schema).sequences(batch).weights
    # Where the target is missing, the last item known is the one that is predicted.
    assert weights.nonzero().tolist() == [[0, 2], [1, 0], [2, 0]]


def test_times_stand_beside_their_tokens() -> None:
    schema = shop()
    config = TransformerConfig(attention="pointwise", times="dwell", max_length=2)
    batch = items(schema, [[4, 5, 6], [7]], [[3], [2]], dwell=[10.2, 20.6, 30.0, 5.0])
    times = config.sequencer(schema).sequences(batch).times
    assert times is not None
    assert times.tolist() == [[21, 30], [5, 0]]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_cut_model_has_the_loss_and_the_gradients_of_the_whole(kind: str) -> None:
    schema = shop()
    config = TransformerConfig(**{"dim": 16, "heads": 2, "layers": 3, **KINDS[kind]})
    model = build(config, schema).double()
    batch = doubled(batch_of(schema, 6, seed=4))
    loss = model.loss(model(batch), batch)
    whole = gradients(model, loss)
    schedule = build_schedule(1, 3, 2, 3)
    parts = build_parts(config.trunk(schema, 3), schedule.shape, 0, CPU).double()
    sequencer = config.sequencer(schema)
    samples = sequencer.sequences(batch)
    runtime = PipelineRuntime(schedule, parts)
    microbatches, _ = PaddedCutter(2, even_bounds(sequencer.length, 3)).cut(samples, sequencer.last(batch) + 1)
    outcome = runtime.step(microbatches, total_weight=6.0)
    assert float(outcome.loss) == pytest.approx(loss.item(), abs=1e-12)
    cuts = {name.split(".", 2)[2] if name.startswith("stages") else name: p for name, p in parts.named_parameters()}
    assert cuts.keys() == whole.keys()
    for name, gradient in whole.items():
        assert torch.allclose(cuts[name].grad, gradient, rtol=0, atol=1e-12), name
        assert float(gradient.abs().max()) > 0, name


def test_loss_is_the_cross_entropy_of_the_states() -> None:
    model = build(TransformerConfig(dim=8, heads=2, layers=1), TOKENS).double()
    batch = doubled(text([1, 2, 3, 4], [6, 7, 5]))
    sequences = model.sequencer.sequences(batch, per_token=True)
    logits = model.encode(sequences) @ model.head.weight.T
    wanted = F.cross_entropy(logits.flatten(0, 1), sequences.targets.flatten(), reduction="none").view(2, -1)
    total, weight = model.token_loss(batch)
    assert total.item() == pytest.approx((wanted * sequences.weights).sum().item(), abs=1e-12)
    assert float(weight) == float(sequences.weights.sum())
    means = torch.stack([wanted[0, :3].mean(), wanted[1, :2].mean()])
    assert model.loss(model(batch), batch).item() == pytest.approx((means * batch.weight).sum().item() / 2, abs=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_later_token_leaves_earlier_states_alone(kind: str) -> None:
    schema = shop()
    model = build(TransformerConfig(**{"dim": 16, "heads": 2, "layers": 2, **KINDS[kind]}), schema).double()
    sequences = model.sequencer.sequences(doubled(batch_of(schema, 3)))
    other = replace(sequences, inputs=sequences.inputs.clone())
    other.inputs[:, 4:] = (other.inputs[:, 4:] + 1) % 17
    before, after = model.encode(sequences), model.encode(other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_the_query_is_the_state_at_the_newest_item() -> None:
    schema = shop()
    model = build(TransformerConfig(dim=8, heads=2, layers=1), schema).double()
    assert isinstance(model, Retriever)
    batch = doubled(items(schema, [[4, 5, 6], [], [7]], [[3], [2], [5]]))
    states, queries = model.encode(model.sequencer.sequences(batch)), model.queries(batch)
    assert torch.equal(queries, torch.stack([states[0, 2], torch.zeros(8), states[2, 0]]))
    assert torch.equal(model.items(torch.tensor([3, 4])), model.head.weight[3:5])


@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
def test_sampled_losses_train_and_their_negatives_depend_on_the_seed_alone(loss: str) -> None:
    schema = shop()
    model = build(TransformerConfig(dim=8, heads=2, layers=1, loss=loss, negatives=4, sampling="log_uniform"), schema)
    batch = batch_of(schema, 8)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(gradients(model, model.loss(model(batch), batch))["head.weight"].clone())
        model.zero_grad(set_to_none=True)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_dropout_is_off_in_evaluation_and_repeats_with_the_seed() -> None:
    model = build(TransformerConfig(dim=8, heads=2, layers=1, dropout=0.5), TOKENS)
    batch = text([1, 2, 3, 4, 5, 6])
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(batch)["loss"].item())
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert model(batch)["loss"].item() == model(batch)["loss"].item()


@pytest.mark.parametrize("kind", list(KINDS))
def test_parts_begin_alike_whatever_the_cut(kind: str) -> None:
    schema = shop()
    config = TransformerConfig(**{"dim": 16, "heads": 2, "layers": 4, **KINDS[kind]})
    wanted = dict(build(config, schema).named_parameters())
    split = {"split_embedding": True, "split_head": True}
    schedule = build_schedule(2, 2, 1, 4, **split)
    seen: dict[str, list[Tensor]] = {}
    for rank in range(2):
        parts = build_parts(config.trunk(schema, 3), schedule.shape, rank, CPU)
        for name, parameter in parts.named_parameters():
            key = name.split(".", 2)[2] if name.startswith("stages") else name
            seen.setdefault(key, []).append(parameter)
    assert seen.keys() == wanted.keys()
    for name, found in seen.items():
        assert torch.equal(torch.cat(found), wanted[name]), name


def test_other_seeds_give_other_weights_of_the_same_size() -> None:
    config = TransformerConfig(dim=64, heads=2, layers=2)
    first, second = (config.trunk(TOKENS, seed).layer(0) for seed in (0, 1))
    assert not torch.equal(first.network.into.weight, second.network.into.weight)
    assert float(first.network.into.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(first.network.out.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_a_tied_output_layer_is_saved_once() -> None:
    model = build(TransformerConfig(dim=8, heads=2, layers=1, tied=True), TOKENS)
    assert "head.weight" not in model.state_dict()
    assert model.output.weight is model.embedding.weight


def test_rotation_depends_on_distances_only_and_turns_back() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    places = torch.arange(5)
    near = rotate(query, places) @ rotate(key, places).transpose(2, 3)
    far = rotate(query, places + 100_000) @ rotate(key, places + 100_000).transpose(2, 3)
    assert torch.allclose(near, far, atol=1e-9)
    assert not torch.allclose(near, query @ key.transpose(2, 3))
    assert torch.autograd.gradcheck(lambda values: rotate(values, places), (query.requires_grad_(),))


def test_a_rotation_keeps_nothing_but_positions() -> None:
    kept: list[Tensor] = []
    values = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rotate(values, torch.arange(5))
    assert [t.dtype for t in kept] == [torch.int64]


def test_attention_share_counts_multiplications() -> None:
    config = TransformerConfig(dim=64, heads=4, kv_heads=2, ffn=256)
    linear = 64 * (64 + 2 * 32) + 64 * 64 + 2 * 64 * 256
    pairs = sum(accumulate([1] * 1000)) / 1000
    assert config.attention_share(1000) == pytest.approx(pairs * 2 * 64 / linear, rel=0.01)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"dim": 10, "heads": 4}, "dim 10 is not a multiple of heads 4"),
        ({"heads": 4, "kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"dim": 12, "heads": 4}, "a head is 3 wide; set positions: learned"),
        ({"dim": 9, "heads": 1, "positions": "learned"}, "dim 9 is odd"),
        ({"attention": "pointwise", "kv_heads": 2}, "no grouped queries; set kv_heads to 0"),
        ({"times": "dwell"}, "times 'dwell' are for pointwise attention"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TransformerConfig(**values)


def test_schemas_that_do_not_fit_are_refused() -> None:
    short = TOKENS.model_copy(update={"features": (TOKENS.features[0].model_copy(update={"max_length": 1}),)})
    with pytest.raises(SchemaError, match="holds 1 token at most, and nothing follows it"):
        TransformerConfig().sequencer(short)
    with pytest.raises(ConfigError, match=r"no sequence 'txt'.*Did you mean 'text'"):
        TransformerConfig(sequence="txt").sequencer(TOKENS)
    with pytest.raises(ConfigError, match=r"no float side column 'dwel'.*history.dwell"):
        TransformerConfig(attention="pointwise", times="dwel").sequencer(shop())
    with pytest.raises(ConfigError, match="falling frequency, which those of table 'token' are not"):
        TransformerConfig(loss="bce", sampling="log_uniform").trunk(TOKENS, 0)
    raw = Schema.model_validate(TOKENS.model_dump() | {"tables": [{"name": "token", "rows": 11, "ids": "raw"}]})
    with pytest.raises(ConfigError, match="table 'token' of sequence 'text' has raw ids"):
        TransformerConfig().sequencer(raw)
