"""What dropping a field does: to a batch, to an output, and to predictions (check: as the score said)."""

import pytest
import torch
from scipy.stats import spearmanr
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from tests.embeddings.fields.planted import CPU, KEYS, Net, clicks, trained
from thresher.embeddings.fields.baselines import GradientNorms, random_scores, shuffled
from thresher.embeddings.fields.exact import exact_scores
from thresher.embeddings.fields.field import find_fields
from thresher.embeddings.fields.pruning import FieldPruner, without_ids
from thresher.embeddings.fields.scorer import FieldScorer
from thresher.embeddings.fields.tap import attach
from thresher.embeddings.tables import find_tables
from thresher.errors import PlanError


def batch(weighted: bool = False) -> KeyedJaggedTensor:
    """
    a   [1 2] [ ]   [3]
    b   [4]   [5 6] [ ]
    c   [ ]   [7]   [8 9]
    """
    ids = torch.arange(1, 10)
    return KeyedJaggedTensor(
        ["a", "b", "c"],
        ids,
        weights=ids / 10 if weighted else None,
        lengths=torch.tensor([2, 0, 1, 1, 2, 0, 0, 1, 2]),
    )


def bags() -> EmbeddingBagCollection:
    """``a`` and ``b`` read one table, ``b`` and ``c`` another: ``b`` has two keys."""
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name="s", num_embeddings=10, embedding_dim=4, feature_names=["a", "b"]),
        EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=8, feature_names=["b", "c"]),
    ]
    return EmbeddingBagCollection(tables, device=CPU)


@pytest.mark.parametrize("weighted", [False, True])
def test_bags_of_dropped_fields_are_emptied(weighted):
    found = without_ids(batch(weighted), {"b"})
    assert found.keys() == ["a", "b", "c"]
    assert found.values().tolist() == [1, 2, 3, 7, 8, 9]
    assert found.lengths().tolist() == [2, 0, 1, 0, 0, 0, 0, 1, 2]
    if weighted:
        torch.testing.assert_close(found.weights(), found.values() / 10)


def test_nothing_is_touched_while_nothing_is_dropped():
    model = bags()
    pruner = FieldPruner(find_fields(find_tables(model)), CPU)
    plain = model(batch())
    attach({"": model}, pruner, None)
    ids = batch()
    assert pruner.emptied("", ids) is ids
    assert torch.equal(model(ids).values(), plain.values())


def test_a_dropped_field_of_two_tables_reads_its_constants_and_gets_no_gradient():
    model = bags()
    fields = find_fields(find_tables(model))
    pruner = FieldPruner(fields, CPU)
    attach({"": model}, pruner, None)
    plain = model(batch())
    mean = torch.arange(float(sum(field.width for field in fields)))
    pruner.drop([1], mean, step=7)
    output = model(batch())
    for key, columns in {"b@s": slice(4, 8), "b@t": slice(8, 16)}.items():
        assert torch.equal(output[key], mean[columns].expand(3, -1))
    for key in ("a", "c"):
        assert torch.equal(output[key], plain[key])
    output.values().sum().backward()
    read_by_b = model.embedding_bags["t"].weight.grad[4:7]
    assert not bool(read_by_b.any())
    assert pruner.idle_tables() == frozenset()
    pruner.drop([0], mean, step=8)
    assert pruner.idle_tables() == {"s"}
    assert pruner.idle_tables(but=[0]) == frozenset()
    pruner.restore([0, 1])
    assert torch.equal(model(batch()).values(), plain.values())


def test_positions_of_a_dropped_sequence_read_the_mean_and_keep_their_number():
    config = EmbeddingConfig(name="t", num_embeddings=10, embedding_dim=4, feature_names=["a", "b", "c"])
    model = EmbeddingCollection([config], device=CPU)
    pruner = FieldPruner(find_fields(find_tables(model)), CPU)
    attach({"": model}, pruner, None)
    pruner.drop([1], torch.arange(12.0), step=0)
    found = model(batch())
    assert found["b"].lengths().tolist() == [1, 2, 0]
    assert torch.equal(found["b"].values(), torch.arange(4.0, 8.0).expand(3, 4))
    assert found["a"].values().shape == (3, 4)


def test_features_with_different_numbers_of_samples_are_refused():
    model = bags()
    attach({"": model}, FieldPruner(find_fields(find_tables(model)), CPU), None)
    ragged = KeyedJaggedTensor(
        ["a", "b", "c"],
        torch.arange(4),
        lengths=torch.ones(4, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [1], [1]],
    )
    with pytest.raises(PlanError, match="fields: fields can be neither scored nor dropped"):
        model(ragged)


def test_the_state_of_pruning_survives_to_the_bit():
    fields = find_fields(find_tables(bags()))
    pruner, other = FieldPruner(fields, CPU), FieldPruner(fields, CPU)
    pruner.drop([0, 2], torch.randn(24), step=5)
    other.load_state_dict(pruner.state_dict())
    assert other.dropped == {0, 2}
    assert torch.equal(other.constants, pruner.constants)
    assert torch.equal(other.dropped_at, torch.tensor([5, -1, 5]))


def test_a_shuffle_moves_bags_with_their_weights_and_no_others():
    whole = batch(weighted=True)
    found = shuffled(whole, "a", torch.Generator().manual_seed(4))
    assert sorted(found["a"].lengths().tolist()) == [0, 1, 2]
    assert found["a"].lengths().tolist() != whole["a"].lengths().tolist()
    torch.testing.assert_close(found.weights(), found.values() / 10)
    for key in ("b", "c"):
        assert torch.equal(found[key].values(), whole[key].values())
        assert torch.equal(found[key].lengths(), whole[key].lengths())


def test_gradient_norms_are_those_of_single_samples():
    """The loss is a mean of 3 samples: b's vectors get a gradient of 2, on 12 columns, a's and c's none."""
    model = bags()
    fields = find_fields(find_tables(model))
    norms = GradientNorms(fields)
    detach = attach({"": model}, FieldPruner(fields, CPU), norms)
    output = model(batch())
    (2 * (output["b@s"].sum() + output["b@t"].sum()) / 3).backward()
    detach()
    assert norms.scores() == pytest.approx([0.0, 2 * 12**0.5, 0.0])
    assert random_scores(fields, 3) == random_scores(fields, 3) != random_scores(fields, 4)


def test_a_score_of_two_keys_is_of_their_sum():
    """Moves of two keys that cancel in a sample do not count."""
    model = bags()
    fields = find_fields(find_tables(model))
    scorer = FieldScorer(fields, CPU, mean=torch.zeros(24))
    attach({"": model}, FieldPruner(fields, CPU), scorer)
    scorer.begin(torch.ones(3))
    output = model(batch())
    first, second = output["b@s"], output["b@t"]
    scale = (first.sum(1) / second.sum(1)).detach().nan_to_num()
    ((first.sum(1) - scale * second.sum(1)).sum() / 3).backward()
    assert scorer.read().score.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


def test_samples_of_weight_zero_count_nowhere():
    scores = []
    for weight in ([1.0, 1.0, 0.0], [1.0, 1.0]):
        model, ids = bags(), batch() if len(weight) == 3 else two_samples()
        fields = find_fields(find_tables(model))
        scorer = FieldScorer(fields, CPU)
        attach({"": model}, FieldPruner(fields, CPU), scorer)
        for _ in range(3):
            scorer.begin(torch.tensor(weight))
            # Couples the samples, as a batch norm would: a sample of weight 0 gets a gradient, too.
            losses = model(ids).values().square().sum(1)
            loss = (losses * torch.tensor(weight)).sum() / len(weight)
            (loss + losses[2:].sum()).backward()
        scores.append(scorer.read())
    assert scores[0].weight == scores[1].weight == 4.0
    torch.testing.assert_close(scores[0].score, scores[1].score, rtol=1e-6, atol=1e-7)


def two_samples() -> KeyedJaggedTensor:
    lengths = torch.tensor([2, 0, 1, 2, 0, 1])
    return KeyedJaggedTensor(["a", "b", "c"], torch.tensor([1, 2, 4, 5, 6, 7]), lengths=lengths)


def test_many_steps_are_kept_in_few_bins():
    """70 steps: 64 bins of one step become 32 of two, and the score is still the mean over all steps but the first."""
    model = bags()
    fields = find_fields(find_tables(model))
    scorer = FieldScorer(fields, CPU, mean=torch.zeros(24))
    attach({"": model}, FieldPruner(fields, CPU), scorer)
    wanted = torch.zeros(3, dtype=torch.float64)
    for step in range(70):
        scorer.begin(torch.ones(3))
        output = model(batch())
        loss = (step + 1) * output.values().sum() / 3
        loss.backward()
        moves = {key: (step + 1) * output[key].detach().sum(1) for key in output.keys()}  # noqa: SIM118
        of_b = moves["b@s"] + moves["b@t"]
        wanted += torch.stack([moves["a"], of_b, moves["c"]]).abs().mean(1).double() / 70
    found = scorer.read()
    torch.testing.assert_close(found.score, wanted, rtol=1e-5, atol=1e-8)
    assert found.weight == 210.0
    assert bool((found.error > 0).all())


@pytest.fixture(scope="module")
def net() -> Net:
    return trained(seed=1)


def test_dropping_a_field_changes_the_loss_as_its_score_says(net):
    """The score is the mean of |first-order change of a sample's loss|: for each field alone, the true changes rank as
    the scores do, and those of the fields of little score are as large as the score within a third."""
    data = clicks(5_000, seed=200)
    losses = torch.nn.BCEWithLogitsLoss(reduction="none")
    scores = exact_scores(
        net.fields(),
        {"bags": net.bags},
        [data],
        loss=lambda part: losses(net(part.sparse), part.labels).mean(),
        weight=lambda part: torch.ones(len(part.labels)),
        device=CPU,
    ).score.tolist()
    pruner = FieldPruner(net.fields(), CPU)
    detach = attach({"bags": net.bags}, pruner, None)
    changes = []
    with torch.no_grad():
        whole = losses(net(data.sparse), data.labels)
        mean = net.bags(data.sparse).values().mean(0)
        for number in range(len(KEYS)):
            pruner.drop([number], mean, step=0)
            changes.append(float((losses(net(data.sparse), data.labels) - whole).abs().mean()))
            pruner.restore([number])
    detach()
    assert spearmanr(scores, changes).statistic >= 0.95
    low = sorted(range(len(KEYS)), key=lambda number: scores[number])[: len(KEYS) // 2]
    for number in low:
        assert changes[number] == pytest.approx(scores[number], rel=1 / 3), KEYS[number]
