"""Costs: the model, fits from measurements, and who pays for embedding and output layer."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from thresher.pipeline.schedule.ops import Kind, Op, Payload, Shape
from thresher.pipeline.simulate.costs import (
    Costs,
    Sample,
    Term,
    Traffic,
    balanced_bounds,
    causal_pairs,
    even_layers,
)

SHAPE = Shape(4, 2, 2, 8)


def _op(kind, index=0, chunk=0):
    return Op(kind, 0, chunk, index)


def test_uniform_costs_are_one_and_two():
    costs = Costs.uniform(8)
    kinds = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD, Kind.LOSS)
    assert [costs.seconds(SHAPE, 3, _op(kind, 5)) for kind in kinds] == [1, 2, 1, 1, 0]


@pytest.mark.parametrize("attention", [0.3, 1, 10])
def test_attention_grows_with_the_slice(attention):
    costs = Costs.uniform(8, attention=attention)
    for index in range(8):
        wanted = 1 + attention * (2 * index + 1) / 8
        assert costs.seconds(SHAPE, 0, _op(Kind.FORWARD, index)) == pytest.approx(wanted, rel=1e-3)
        parts = [costs.seconds(SHAPE, 0, _op(kind, index)) for kind in (Kind.INPUT_BACKWARD, Kind.WEIGHT_BACKWARD)]
        assert sum(parts) == pytest.approx(costs.seconds(SHAPE, 0, _op(Kind.BACKWARD, index)))


def test_pairs_are_counted_one_by_one():
    costs = replace(Costs.uniform(3), bounds=(0, 3, 4, 7), batch=2)
    for index, (low, high) in enumerate(pairwise(costs.bounds)):
        assert costs.pairs(index) == 2 * sum(1 for query in range(low, high) for key in range(query + 1))
        assert costs.tokens(index) == 2 * (high - low)


def test_moved_attention_is_that_of_the_oldest_slices():
    costs = replace(Costs.uniform(3), bounds=(0, 3, 4, 7), forward=Term(per_pair=1.0), batch=2, layers=(5,) * 8)
    assert costs.moved_seconds(SHAPE, 0, _op(Kind.FORWARD, 2), 2) == 5 * 2 * 3 * 4


def test_embedding_is_paid_by_the_first_chunk_or_by_all():
    costs = replace(Costs.uniform(8), embed=Term(fixed=0.4), embed_backward=Term(fixed=0.8))
    assert costs.seconds(SHAPE, 0, _op(Kind.FORWARD)) == 1.4
    assert costs.seconds(SHAPE, 0, _op(Kind.BACKWARD)) == 2.8
    assert costs.seconds(SHAPE, 0, _op(Kind.FORWARD, chunk=1)) == costs.seconds(SHAPE, 1, _op(Kind.FORWARD)) == 1
    split = replace(SHAPE, split_embedding=True)
    assert costs.seconds(split, 0, _op(Kind.FORWARD)) == 1
    assert costs.seconds(split, 2, _op(Kind.EMBED)) == 0.1
    assert costs.seconds(split, 2, _op(Kind.EMBED_BACKWARD)) == 0.2


def test_the_output_layer_is_paid_by_the_last_rank_or_by_all():
    costs = replace(Costs.uniform(8), head=Term(fixed=4.0), head_weight=Term(fixed=2.0), loss=Term(fixed=0.5))
    assert costs.seconds(SHAPE, 3, _op(Kind.LOSS)) == 6.5
    split = replace(SHAPE, split_head=True)
    paid = [costs.seconds(split, 1, _op(kind)) for kind in (Kind.HEAD, Kind.HEAD_WEIGHT, Kind.LOSS)]
    assert paid == [1, 0.5, 0.5]


def test_measured_seconds_win():
    stage = SHAPE.stage(2, 1)
    costs = replace(Costs.uniform(8), measured={(Kind.FORWARD, stage, 3): 9.0})
    assert costs.seconds(SHAPE, 2, _op(Kind.FORWARD, 3, 1)) == 9
    assert costs.seconds(SHAPE, 2, _op(Kind.FORWARD, 2, 1)) == 1


def test_messages_hold_what_their_payload_says():
    traffic = Traffic(hidden=4.0, statistics=2.0, normaliser=1.0)
    costs = replace(Costs.uniform(2), bounds=(0, 10, 30), batch=3, traffic=traffic)
    sizes = {payload: costs.message_bytes(Op(Kind.SEND, 0, 0, 1, payload, 1)) for payload in Payload}
    assert sizes.pop(Payload.PARTIAL) == 60 * 6
    assert sizes.pop(Payload.NORMALISER) == 60
    assert set(sizes.values()) == {60 * 4}
    assert costs.message_bytes(_op(Kind.FORWARD)) == 0
    moved = replace(costs, traffic=Traffic(key_value=5.0, query=7.0))
    assert moved.exchange_bytes(Kind.FORWARD, 1, 1) == (30 * 5 + 60 * 7, 60 * 7)
    assert moved.exchange_bytes(Kind.BACKWARD, 1, 1) == (30 * 5 + 3 * 60 * 7, 30 * 5 + 60 * 7)


def test_a_fit_finds_the_term_behind_noisy_samples():
    rng = np.random.default_rng(0)
    truth = Term(per_token=3e-6, per_pair=2e-10, fixed=4e-4)
    samples = [
        Sample(tokens, pairs, truth.seconds(tokens, pairs) * rng.normal(1, 0.02))
        for tokens in (256, 1024, 4096)
        for pairs in (tokens**2 / 2, tokens * 8192, tokens * 65536)
    ]
    found = Term.fit(samples)
    for tokens, prefix in ((512, 0), (2048, 10_000), (1024, 32_768)):
        pairs = causal_pairs(prefix, prefix + tokens)
        assert found.seconds(tokens, pairs) == pytest.approx(truth.seconds(tokens, pairs), rel=0.04)


def test_a_fit_never_pays_for_work():
    found = Term.fit([Sample(100, 0, 1.0), Sample(200, 50_000, 1.0), Sample(400, 0, 1.1)])
    assert min(found.per_token, found.per_pair, found.fixed) >= 0


def test_costs_are_fitted_by_kind():
    forward = [Sample(tokens, tokens * 10, 2e-3 * tokens) for tokens in (1, 2, 4)]
    backward = [sample._replace(seconds=3 * sample.seconds) for sample in forward]
    costs = Costs.fit((0, 10, 20), {Kind.FORWARD: forward, Kind.BACKWARD: backward}, layers=(2,) * 8, batch=2)
    shape = replace(SHAPE, slices=2)
    parts = [costs.seconds(shape, 0, _op(kind)) for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.LOSS)]
    assert parts[2] == 0
    assert parts[1] == pytest.approx(3 * parts[0])
    assert costs.batch == 2


def test_the_output_layer_is_fitted_without_attention():
    forward = [Sample(tokens, tokens * 10, 2e-3 * tokens) for tokens in (1, 2, 4)]
    loss = [Sample(tokens, pairs, 1e-3 * pairs) for tokens, pairs in ((10, 5), (10, 15))]
    costs = Costs.fit((0, 10, 20), {Kind.FORWARD: forward, Kind.BACKWARD: forward, Kind.LOSS: loss})
    assert costs.loss.per_pair == 0
    assert 5e-3 < costs.seconds(SHAPE, 3, _op(Kind.LOSS)) < 15e-3


def test_layers_are_spread_evenly_longer_stages_first():
    assert even_layers(10, 4) == (3, 3, 2, 2)


def test_balanced_slices_cost_the_same_and_get_shorter():
    term = Term(per_token=1.0, per_pair=0.002)
    bounds = balanced_bounds(8192, 6, term, multiple=16)
    lengths = [high - low for low, high in pairwise(bounds)]
    spent = [term.seconds(high - low, causal_pairs(low, high)) for low, high in pairwise(bounds)]
    assert lengths == sorted(lengths, reverse=True)
    assert max(spent) / min(spent) < 1.05
    assert bounds[0] == 0
    assert bounds[-1] == 8192
    assert all(bound % 16 == 0 for bound in bounds)


def test_slices_that_cannot_be_balanced_are_refused():
    with pytest.raises(ValueError, match="6 slices of 64 tokens in steps of 16 cannot be balanced"):
        balanced_bounds(64, 6, Term(per_token=1.0), multiple=16)
