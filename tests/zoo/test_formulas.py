"""Each ranker against its formula, written as loops over samples, fields and ids, in fp64: outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.data import CPU, batch_of, doubled, gradients, rows_of, shop, slow_twin, table, worst
from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.zoo.blocks.mlp import Head, MlpConfig
from thresher.zoo.dcnv2.model import DcnV2Config
from thresher.zoo.deepfm.model import DeepFmConfig
from thresher.zoo.din.model import DinConfig
from thresher.zoo.dlrm.model import DlrmConfig
from thresher.zoo.fm.model import FmConfig
from thresher.zoo.lr.model import LrConfig

TOLERANCE = 1e-10
SMALL = MlpConfig(hidden=(5, 3))
WEIGHTED = [
    {"kind": "sparse", "name": "user", "table": "users"},
    {"kind": "sparse", "name": "tags", "table": "tags", "many": True, "weights": "tag_weights"},
    {"kind": "sparse", "name": "item", "table": "items"},
    {"kind": "sequence", "name": "history", "table": "items", "max_length": 5},
    {"kind": "dense", "name": "price"},
    {"kind": "label", "name": "click"},
    {"kind": "label", "name": "rating", "task": "regression"},
]


def pooled(model: nn.Module, schema: Schema, batch: Batch, key: str, sample: int, mode: str) -> Tensor:
    """One key's vector of one sample, by the definition."""
    weights = table(model, schema.id_tables[key])
    ids = rows_of(batch, key, sample)
    ragged = batch.sparse[key]
    scale = [1.0] * len(ids)
    if ragged.weights_or_none() is not None:
        first = int(ragged.offsets()[sample])
        scale = ragged.weights()[first : first + len(ids)].tolist()
    total = torch.zeros(weights.shape[1], dtype=torch.float64)
    for i, row in enumerate(ids):
        total = total + scale[i] * weights[row]
    return total / max(len(ids), 1) if mode == "mean" else total


def mlp(layers: nn.Module, values: Tensor) -> Tensor:
    """ReLU layers and a linear one, a product at a time."""
    linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
    for layer in linear:
        values = layer.weight @ values + layer.bias
        values = values if isinstance(layer, Head) else values.clamp(min=0)
    return values


def order(model: nn.Module) -> list[str]:
    return list(model.tables.keys)


def lr(model: Any, vectors: dict[str, Tensor], floats: Tensor) -> Tensor:
    labels = len(model.labels)
    return model.bias + sum(v[:labels] for v in vectors.values()) + floats @ model.float_weights


def fm(model: Any, vectors: dict[str, Tensor], floats: Tensor) -> Tensor:
    machine, d = model.machine, model.machine.factors
    labels = len(model.labels)
    factors = [v[:d] for v in vectors.values()] + [x * v for x, v in zip(floats, machine.float_vectors, strict=True)]
    output = machine.bias + sum(v[d : d + labels] for v in vectors.values()) + floats @ machine.float_weights
    for i in range(len(factors)):
        for j in range(i):
            for k in range(d):
                scale = (
                    torch.ones(labels, dtype=torch.float64) if machine.pair_weights is None else machine.pair_weights[k]
                )
                output = output + scale * factors[i][k] * factors[j][k]
    return output


def deepfm(model: Any, vectors: dict[str, Tensor], floats: Tensor) -> Tensor:
    machine, d = model.machine, model.machine.factors
    deep = [vectors[key][:d] for key in order(model)]
    deep += [x * v for x, v in zip(floats, machine.float_vectors, strict=True)]
    return fm(model, vectors, floats) + mlp(model.mlp, torch.cat(deep))


def dlrm(model: Any, vectors: dict[str, Tensor], floats: Tensor) -> Tensor:
    bottom = mlp(model.bottom, floats)
    all_vectors = [bottom] + [vectors[key] for key in order(model)]
    dots = [all_vectors[i] @ all_vectors[j] for i in range(len(all_vectors)) for j in range(i)]
    return mlp(model.top, torch.cat([bottom, torch.stack(dots)]))


def dcn(model: Any, vectors: dict[str, Tensor], floats: Tensor) -> Tensor:
    first = torch.cat([vectors[key] for key in order(model)] + [floats])
    crossed = first
    for layer in model.cross.layers:
        name = type(layer).__name__
        if name == "CrossLayer":
            crossed = first * (layer.linear.weight @ crossed + layer.linear.bias) + crossed
        elif name == "LowRankCrossLayer":
            crossed = first * (layer.up.weight @ (layer.down.weight @ crossed) + layer.up.bias) + crossed
        else:
            gates = torch.softmax(model.cross.gate.weight @ crossed, 0)
            mixed = torch.zeros_like(crossed)
            for expert, gate in enumerate(gates):
                inner = torch.tanh(layer.core[expert] @ torch.tanh(layer.down[expert].T @ crossed))
                mixed = mixed + gate * (first * (layer.up[expert] @ inner + layer.bias))
            crossed = mixed + crossed
    if model.mlp is None:
        return model.head.weight @ crossed + model.head.bias
    last = mlp(model.mlp, crossed) if model.stacked else torch.cat([crossed, mlp(model.mlp, first)])
    return model.head.weight @ last + model.head.bias


CASES = {
    "lr": (LrConfig(), lr),
    "fm": (FmConfig(dim=5), fm),
    "deepfm": (DeepFmConfig(dim=5, mlp=SMALL), deepfm),
    "dlrm": (DlrmConfig(dim=4, bottom=SMALL, top=SMALL), dlrm),
    "dcn full": (DcnV2Config(dim=4, mlp=SMALL), dcn),
    "dcn stacked": (DcnV2Config(dim=4, mlp=SMALL, structure="stacked"), dcn),
    "dcn low rank": (DcnV2Config(dim=4, mlp=SMALL, cross="low_rank", rank=3), dcn),
    "dcn mixture": (DcnV2Config(dim=4, mlp=SMALL, cross="mixture", rank=3, experts=2), dcn),
    "dcn alone": (DcnV2Config(dim=4, mlp=MlpConfig(hidden=()), cross="mixture", rank=2, experts=3), dcn),
}


@pytest.mark.parametrize("labels", [("click",), ("rating", "click")])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_pooled_rankers_equal_their_formula(case: str, mode: str, labels: tuple[str, ...]) -> None:
    config, formula = CASES[case]
    schema = shop(features=WEIGHTED) if mode == "sum" else shop()
    torch.manual_seed(0)
    model = slow_twin(config.model_copy(update={"labels": labels, "pooling": mode}).build(schema, CPU))
    batch = doubled(batch_of(schema, 4))
    expected = torch.stack(
        [
            formula(
                model,
                {key: pooled(model, schema, batch, key, b, mode) for key in schema.id_tables},
                batch.dense[b],
            )
            for b in range(batch.size)
        ]
    )
    outputs = model(batch)
    assert list(outputs) == list(labels)
    given = torch.stack([outputs[label] for label in labels], 1)
    assert float((given - expected).detach().abs().max()) <= TOLERANCE
    probe = torch.randn_like(expected)
    left, right = gradients(model, (given * probe).sum()), gradients(model, (expected * probe).sum())
    assert worst(left, right) <= TOLERANCE
    assert sum(float(g.abs().sum()) for g in left.values()) > 0


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["relu", "prelu", "dice"])
def test_din_equals_its_formula(softmax: bool, activation: str) -> None:
    schema = shop()
    torch.manual_seed(0)
    unit = MlpConfig(hidden=(6,), activation=activation)
    model: Any = slow_twin(DinConfig(dim=4, unit=unit, softmax=softmax, mlp=SMALL).build(schema, CPU)).eval()
    batch = doubled(batch_of(schema, 5))

    def act(values: Tensor) -> Tensor:
        if activation == "relu":
            return values.clamp(min=0)
        layer = model.attentions[0].unit.layers[1]
        if activation == "prelu":
            return torch.where(values > 0, values, layer.weight * values)
        p = torch.sigmoid((values - layer.norm.running_mean) / torch.sqrt(layer.norm.running_var + 1e-9))
        return p * values + (1 - p) * layer.alpha * values

    expected = []
    for b in range(batch.size):
        one = {key: pooled(model, schema, batch, key, b, "mean") for key in ("user", "item", "category", "tags")}
        target = torch.cat([one["item"], one["category"]])
        history = [
            torch.cat([table(model, "items")[i], table(model, "categories")[c]])
            for i, c in zip(rows_of(batch, "history", b), rows_of(batch, "history.category", b), strict=True)
        ]
        linear = [layer for layer in model.attentions[0].unit.layers if isinstance(layer, nn.Linear)]
        scores = []
        for e in history:
            hidden = act(linear[0].weight @ torch.cat([target, e, target - e, target * e]) + linear[0].bias)
            scores.append((linear[1].weight @ hidden + linear[1].bias)[0])
        weights = torch.softmax(torch.stack(scores), 0) if softmax and scores else scores
        interest = sum((w * e for w, e in zip(weights, history, strict=True)), torch.zeros(8, dtype=torch.float64))
        parts = [one[key] for key in model.plain] + [one[key] for key in model.tables.keys] + [batch.dense[b], interest]
        expected.append(mlp(model.mlp, torch.cat(parts))[0])
    given = model(batch)["click"]
    stacked = torch.stack(expected)
    assert float((given - stacked).detach().abs().max()) <= TOLERANCE
    probe = torch.randn_like(stacked)
    left, right = gradients(model, (given * probe).sum()), gradients(model, (stacked * probe).sum())
    assert worst(left, right) <= TOLERANCE


def test_loss_is_the_weighted_sum_over_the_number_of_samples() -> None:
    schema = shop()
    model = slow_twin(LrConfig(labels=("click", "rating")).build(schema, CPU))
    batch = doubled(batch_of(schema, 6))
    outputs = {label: output.detach() for label, output in model(batch).items()}
    total = torch.zeros((), dtype=torch.float64)
    for b in range(6):
        p = 1 / (1 + torch.exp(-outputs["click"][b]))
        y = batch.labels[b, 0]
        total = total - batch.weight[b] * (y * torch.log(p) + (1 - y) * torch.log(1 - p))
        total = total + batch.weight[b] * (outputs["rating"][b] - batch.labels[b, 1]) ** 2
    assert float((model.loss(outputs, batch) - total / 6).abs()) <= TOLERANCE
