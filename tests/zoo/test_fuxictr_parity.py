"""Our FM, DeepFM, DCN V2 and DIN against FuxiCTR 2.3.10's layers with the same weights, in fp64: outputs, gradients.

Skipped where FuxiCTR is not installed (``make peers``). DeepFM, DCN V2 and DIN are put together from its layers as its
own models do; the differences found are printed (``pytest -s``).
"""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.data import CPU, batch_of, clear, doubled, shop, slow_twin, table, with_ids
from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.mlp import MlpConfig
from thresher.zoo.dcnv2.model import DcnV2Config
from thresher.zoo.deepfm.model import DeepFmConfig
from thresher.zoo.din.model import DinConfig
from thresher.zoo.fm.model import FmConfig

layers: Any = pytest.importorskip("fuxictr.pytorch.layers", reason="FuxiCTR is not installed", exc_type=ImportError)

TOLERANCE = 1e-12
FIELDS = ("a", "b", "c")
HIDDEN = (7, 5)
SCHEMA = Schema.model_validate(
    {
        "name": "flat",
        "tables": [{"name": f"table_{name}", "rows": 11} for name in FIELDS],
        "features": [
            *({"kind": "sparse", "name": name, "table": f"table_{name}"} for name in FIELDS),
            {"kind": "dense", "name": "x"},
            {"kind": "dense", "name": "y"},
            {"kind": "label", "name": "click"},
        ],
    }
)


def feature_map(floats: bool) -> SimpleNamespace:
    """What FuxiCTR's embedding layers read of a feature map."""
    features: OrderedDict[str, Any] = OrderedDict(
        (name, {"type": "categorical", "vocab_size": 11, "source": ""}) for name in FIELDS
    )
    if floats:
        features |= {name: {"type": "numeric", "source": ""} for name in ("x", "y")}
    return SimpleNamespace(features=features, num_fields=len(features), data_dir="")


def columns(batch: Batch, floats: bool) -> dict[str, Tensor]:
    """A batch as FuxiCTR's layers take it."""
    inputs = {name: batch.sparse[name].values() for name in FIELDS}
    return inputs | ({"x": batch.dense[:, 0], "y": batch.dense[:, 1]} if floats else {})


class Weights:
    """Copies of weights into the peer, and after a backward the comparison of their gradients."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any, Any, Any]] = []

    def tie(self, ours: Tensor, peer: nn.Parameter, cut: Any = ..., shape: tuple[int, ...] | None = None) -> None:
        """Gives ``peer`` our values at ``cut``, reshaped."""
        with torch.no_grad():
            values = ours[cut].reshape(shape or ours[cut].shape)
            assert values.shape == peer.shape
            peer.copy_(values)
        self.pairs.append((ours, peer, cut, tuple(peer.shape)))

    def tie_mlp(self, ours: nn.Module, peer: nn.Module) -> None:
        """All parameters of two perceptrons, in order."""
        left, right = list(ours.parameters()), list(peer.parameters())
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            self.tie(a, b)

    def gradient_gap(self) -> float:
        """The largest difference of gradients; every gradient must exist and not vanish."""
        gaps = []
        for ours, peer, cut, shape in self.pairs:
            assert peer.grad is not None
            assert float(peer.grad.abs().max()) > 0
            gaps.append(float((ours.grad[cut].reshape(shape) - peer.grad).abs().max()))
        return max(gaps)


def compare(name: str, model: Any, given: Tensor, peer: Tensor, weights: Weights) -> None:
    """Asserts equal outputs and gradients of a random projection."""
    gap = float((given - peer.squeeze(-1)).detach().abs().max())
    probe = torch.randn_like(given)
    clear(model)
    (given * probe).sum().backward()
    (peer.squeeze(-1) * probe).sum().backward()
    slope = weights.gradient_gap()
    print(f"{name}: forward {gap:.1e}, gradients {slope:.1e}")
    assert gap <= TOLERANCE
    assert slope <= TOLERANCE


def tie_factors(weights: Weights, model: Any, peer: Any, embedding: Any, dim: int) -> None:
    """FM weights: vectors, first-order weights, bias, of ids and floats."""
    linear = peer.lr_layer.embedding_layer.embedding_layer.embedding_layers
    vectors = embedding.embedding_layer.embedding_layers
    for name in FIELDS:
        rows = table(model, f"table_{name}")
        weights.tie(rows, vectors[name].weight, (slice(None), slice(0, dim)))
        weights.tie(rows, linear[name].weight, (slice(None), slice(dim, dim + 1)))
    for i, name in enumerate(("x", "y")):
        for layer in (vectors[name], linear[name]):
            # FuxiCTR turns floats into float32 whatever the weights are; ours come from float32, so nothing is lost.
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].double(),))
        weights.tie(model.machine.float_vectors, vectors[name].weight, i, (dim, 1))
        weights.tie(model.machine.float_weights, linear[name].weight, i, (1, 1))
    weights.tie(model.machine.bias, peer.lr_layer.bias)


@pytest.mark.parametrize("deep", [False, True])
def test_fm_and_deepfm(deep: bool) -> None:
    torch.manual_seed(0)
    dim = 6
    config = DeepFmConfig(dim=dim, mlp=MlpConfig(hidden=HIDDEN)) if deep else FmConfig(dim=dim)
    model: Any = slow_twin(config.build(SCHEMA, CPU))
    batch = doubled(batch_of(SCHEMA, 16))
    fields = feature_map(floats=True)
    embedding = layers.FeatureEmbedding(fields, dim).double()
    peer = layers.FactorizationMachine(fields).double()
    weights = Weights()
    tie_factors(weights, model, peer, embedding, dim)
    inputs = columns(batch, floats=True)
    vectors = embedding(inputs)
    output = peer(inputs, vectors)
    if deep:
        network = layers.MLP_Block(5 * dim, list(HIDDEN), output_dim=1).double()
        weights.tie_mlp(model.mlp, network)
        output = output + network(vectors.flatten(start_dim=1))
    compare("DeepFM" if deep else "FM", model, model(batch)["click"], output, weights)


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("cross", ["full", "mixture"])
def test_dcnv2(cross: str, structure: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"cross": cross, "structure": structure}
    config = DcnV2Config(dim=4, layers=3, rank=3, experts=2, mlp=MlpConfig(hidden=HIDDEN), **options)
    schema = SCHEMA.model_copy(update={"features": tuple(f for f in SCHEMA.features if f.kind != "dense")})
    model: Any = slow_twin(config.build(schema, CPU))
    batch = doubled(batch_of(schema, 16))
    embedding = layers.FeatureEmbedding(feature_map(floats=False), 4).double()
    network = layers.MLP_Block(12, list(HIDDEN)).double()
    weights = Weights()
    for name in FIELDS:
        weights.tie(table(model, f"table_{name}"), embedding.embedding_layer.embedding_layers[name].weight)
    if cross == "full":
        crosses = layers.CrossNetV2(12, 3).double()
        weights.tie_mlp(model.cross, crosses)
    else:
        crosses = layers.CrossNetMix(12, layer_num=3, low_rank=3, num_experts=2).double()
        for i, layer in enumerate(model.cross.layers):
            weights.tie(layer.down, crosses.V_list[i])
            weights.tie(layer.up, crosses.U_list[i])
            weights.tie(layer.core, crosses.C_list[i])
            weights.tie(layer.bias, crosses.bias[i], shape=(12, 1))
        for expert, gate in enumerate(crosses.gating):
            weights.tie(model.cross.gate.weight, gate.weight, expert, (1, 12))
    weights.tie_mlp(model.mlp, network)
    head = nn.Linear(model.head.in_features, 1).double()
    weights.tie_mlp(model.head, head)
    first = embedding(columns(batch, floats=False), flatten_emb=True)
    crossed = crosses(first)
    last = network(crossed) if structure == "stacked" else torch.cat([crossed, network(first)], dim=-1)
    compare(f"DCNv2 {cross} {structure}", model, model(batch)["click"], head(last), weights)


class PeerDin(nn.Module):
    """FuxiCTR's DIN from its layers: embeddings, attended history, perceptron."""

    def __init__(self, model: Any, weights: Weights, activation: str, softmax: bool) -> None:
        super().__init__()
        self.order = [*model.plain, *model.tables.keys]
        rows = {"items": 17, "categories": 7, "users": 13}
        self.embeddings = nn.ModuleDict({f"t_{name}": nn.Embedding(count, 4) for name, count in rows.items()})
        self.attention = layers.DIN_Attention(8, [6], activation, use_softmax=softmax)
        self.network = layers.MLP_Block(12 + 8, list(HIDDEN), output_dim=1)
        self.double()
        for name in ("items", "categories", "users"):
            weights.tie(table(model, name), self.embeddings[f"t_{name}"].weight)
        weights.tie_mlp(model.attentions[0].unit, self.attention.attention_layer)
        weights.tie_mlp(model.mlp, self.network)

    def forward(self, batch: Batch, schema: Schema) -> Tensor:
        """[B, 1] logits."""

        def look(key: str, ids: Tensor) -> Tensor:
            rows: Tensor = self.embeddings[f"t_{schema.id_tables[key]}"](ids)
            return rows

        single = {key: look(key, batch.sparse[key].values()) for key in self.order}
        longest = int(batch.sparse["history"].lengths().max())
        history = torch.cat(
            [look(k, batch.sparse[k].to_padded_dense(longest).long()) for k in ("history", "history.category")], dim=-1
        )
        mask = torch.arange(longest) < batch.sparse["history"].lengths()[:, None]
        target = torch.cat([single["item"], single["category"]], dim=-1)
        attended = self.attention(target, history, mask.double())
        output: Tensor = self.network(torch.cat([*single.values(), attended], dim=-1))
        return output


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("activation", "training"), [("relu", True), ("dice", False), ("dice", True)])
def test_din(activation: str, training: bool, softmax: bool) -> None:
    """Dice is compared in training on full histories only: the peer's statistics include padding, ours do not."""
    torch.manual_seed(0)
    schema = shop()
    unit = MlpConfig.model_validate({"hidden": (6,), "activation": activation})
    features = ("user", "item", "category", "history", "history.category")
    config = DinConfig(dim=4, unit=unit, softmax=softmax, mlp=MlpConfig(hidden=HIDDEN), features=features)
    model: Any = slow_twin(config.build(schema, CPU)).train(training)
    weights = Weights()
    peer = PeerDin(model, weights, activation, softmax).train(training)
    batch = doubled(batch_of(schema, 16))
    if activation == "dice" and training:
        batch = doubled(full_histories(schema, 16))
    elif softmax:
        # The peer's softmax of an empty history is uniform over padding instead of zero.
        batch = doubled(without_empty(schema))
    name = f"DIN {activation}{' softmax' if softmax else ''}{'' if training else ' eval'}"
    compare(name, model, model(batch)["click"], peer(batch, schema), weights)


def full_histories(schema: Schema, size: int) -> Batch:
    """A batch whose histories all have the greatest length."""
    return _with_lengths(schema, torch.full((size,), 6))


def without_empty(schema: Schema) -> Batch:
    """A batch whose histories have at least one item."""
    return _with_lengths(schema, torch.arange(16) % 6 + 1)


def _with_lengths(schema: Schema, lengths: Tensor) -> Batch:
    batch = batch_of(schema, len(lengths))
    for key, rows in (("history", 17), ("history.category", 7)):
        histories = [torch.randint(0, rows, (n,)).tolist() for n in lengths.tolist()]
        batch = with_ids(batch, key, histories)
    return batch
