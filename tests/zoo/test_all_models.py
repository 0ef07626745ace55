"""What holds for every model: unusual batches, meta tables, autocast, weights of zero, learning."""

from dataclasses import replace

import pytest
import torch

from tests.zoo.data import CPU, batch_of, clear, gradients, shop, with_ids
from thresher.data.schema import Schema
from thresher.trainer.model import Model, ModelConfig
from thresher.zoo.blocks.mlp import MlpConfig
from thresher.zoo.dcnv2.model import DcnV2Config
from thresher.zoo.deepfm.model import DeepFmConfig
from thresher.zoo.din.model import DinConfig
from thresher.zoo.dlrm.model import DlrmConfig
from thresher.zoo.fm.model import FmConfig
from thresher.zoo.lr.model import LrConfig
from thresher.zoo.sasrec.model import SasRecConfig
from thresher.zoo.transformer.config import TransformerConfig

NORMED = MlpConfig(hidden=(8, 4), activation="dice", batch_norm=True)
CONFIGS: dict[str, ModelConfig] = {
    "lr": LrConfig(),
    "fm": FmConfig(dim=6),
    "deepfm": DeepFmConfig(dim=6, mlp=NORMED),
    "dlrm": DlrmConfig(dim=8, bottom=NORMED, top=NORMED),
    "dcnv2": DcnV2Config(dim=8, mlp=NORMED, cross="mixture", rank=3),
    "din": DinConfig(dim=8, mlp=NORMED),
    "din softmax": DinConfig(dim=8, mlp=NORMED, softmax=True),
    "sasrec": SasRecConfig(dim=8, dropout=0.0),
    "transformer": TransformerConfig(dim=8, heads=2, layers=1),
    "transformer pointwise": TransformerConfig(
        dim=8, heads=2, layers=1, attention="pointwise", loss="bce", negatives=2
    ),
}
every_model = pytest.mark.parametrize("name", list(CONFIGS))


def build(name: str, schema: Schema | None = None) -> Model:
    torch.manual_seed(0)
    return CONFIGS[name].build(schema or shop(), CPU)


@every_model
@pytest.mark.parametrize(("size", "empty"), [(1, False), (1, True), (5, True), (64, False)])
def test_any_batch_gives_finite_gradients(name: str, size: int, empty: bool) -> None:
    schema = shop()
    model, batch = build(name), batch_of(schema, size, empty=empty)
    loss = model.loss(model(batch), batch)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(model, loss).values())


@every_model
def test_meta_tables_leave_the_dense_part_as_it_is(name: str) -> None:
    schema = shop()
    real = build(name)
    torch.manual_seed(0)
    model = CONFIGS[name].build(schema, torch.device("meta"))
    dense = dict(real.named_parameters())
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            assert "collection" in path
        else:
            assert torch.equal(parameter, dense[path])
    assert sum(p.is_meta for p in model.parameters()) == sum("collection" in path for path in dense)


@every_model
def test_rows_are_a_multiple_of_four_floats(name: str) -> None:
    for path, parameter in build(name).named_parameters():
        if "collection" in path:
            assert parameter.shape[1] % 4 == 0


@every_model
def test_samples_of_weight_zero_change_nothing(name: str) -> None:
    schema = shop()
    batch = batch_of(schema, 12)
    kept = torch.arange(12) < 8
    other = batch_of(schema, 12, seed=1)
    weight = torch.where(kept, batch.weight, 0.0)
    mixed = replace(
        batch,
        weight=weight,
        dense=torch.where(kept[:, None], batch.dense, other.dense),
        labels=torch.where(kept[:, None], batch.labels, other.labels),
    )
    first, second = build(name).train(), build(name).train()
    one = replace(batch, weight=weight)
    torch.manual_seed(0)  # of negatives, as at the beginning of a step
    left = gradients(first, first.loss(first(one), one))
    torch.manual_seed(0)
    right = gradients(second, second.loss(second(mixed), mixed))
    for path in left:
        assert torch.equal(left[path], right[path]), path
    for path, buffer in first.named_buffers():
        assert torch.equal(buffer, dict(second.named_buffers())[path]), path


@every_model
def test_bfloat16_autocast_trains_and_stays_close(name: str) -> None:
    schema = shop()
    batch = batch_of(schema, 32)
    exact, rough = build(name), build(name)
    wanted = exact.loss(exact(batch), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = rough(batch)
        loss = rough.loss(outputs, batch)
    assert loss.dtype == torch.float32
    assert all(output.dtype == torch.float32 for output in outputs.values() if output.is_floating_point())
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=0.05)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in rough.parameters())


@every_model
def test_equal_seeds_give_equal_steps(name: str) -> None:
    schema = shop()
    batch = batch_of(schema, 16)
    losses = []
    for _ in range(2):
        model = build(name)
        step = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model.loss(model(batch), batch)
            clear(model)
            loss.backward()
            step.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_din_attends_to_a_set() -> None:
    schema = shop()
    batch = batch_of(schema, 1)
    model = build("din").eval()
    there = with_ids(with_ids(batch, "history", [[2, 3, 4]]), "history.category", [[1, 5, 6]])
    back = with_ids(with_ids(batch, "history", [[4, 2, 3]]), "history.category", [[6, 1, 5]])
    apart = with_ids(there, "history", [[4, 2, 3]])
    assert torch.allclose(model(there)["click"], model(back)["click"], atol=1e-6)
    assert not torch.allclose(model(there)["click"], model(apart)["click"], atol=1e-6)


PLANTED = {
    "name": "planted",
    "tables": [{"name": "left", "rows": 12}, {"name": "right", "rows": 12}],
    "features": [
        {"kind": "sparse", "name": "a", "table": "left"},
        {"kind": "sparse", "name": "b", "table": "right"},
        {"kind": "label", "name": "click"},
    ],
}


@pytest.mark.parametrize("name", ["fm", "deepfm", "dlrm", "dcnv2"])
def test_crosses_learn_what_a_linear_model_cannot(name: str) -> None:
    """The label is whether a + b is even: no first-order weight tells it."""
    schema = Schema.model_validate(PLANTED)
    batch = batch_of(schema, 512)
    a, b = batch.sparse["a"].values(), batch.sparse["b"].values()
    batch = replace(batch, labels=((a + b) % 2 == 0).float()[:, None], weight=torch.ones(512))
    finals = {}
    for each in ("lr", name):
        model = build(each, schema)
        steps = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(60):
            loss = model.loss(model(batch), batch)
            clear(model)
            loss.backward()
            steps.step()
        finals[each] = loss.item()
    assert finals["lr"] > 0.6
    assert finals[name] < 0.3
