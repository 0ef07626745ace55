"""Random shapes, cuts, sequences, weights and options: still the gradients of one process."""

import random

import pytest
import torch

from tests.pipeline.runtime.test_equality import Case, require_equal
from tests.pipeline.runtime.tiny import VOCABULARY, WIDTH, Tiny
from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.work import Work

CASES = 5


def microbatch(draw: random.Random, slices: int, packed: bool, batch: int, vectors: bool) -> Microbatch:
    """Slices of any length, some tokens without weight."""
    tokens = draw.randint(slices, 5 * slices)
    bounds = (0, *sorted(draw.sample(range(1, tokens), slices - 1)), tokens)
    starts = (0, *sorted(draw.sample(range(1, tokens), draw.randint(0, min(6, tokens - 1)))))
    layout = Layout(bounds, 1, starts) if packed else Layout(bounds, batch)
    shape, generator = (layout.batch, tokens), torch.Generator().manual_seed(draw.randrange(1 << 30))
    inputs, targets = torch.randint(VOCABULARY, (2, *shape), generator=generator)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    weights *= torch.rand(shape, generator=generator) < 0.7
    if vectors:
        inputs = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
    times = torch.randint(0, 5000, shape, generator=generator).cumsum(1)
    return Microbatch(layout, inputs, targets, weights, times)


def case(draw: random.Random, stages: int, chunks: int, microbatches: int, slices: int) -> Case:
    """A model, microbatches of different layouts, and any options that go together."""
    vectors, packed, batch = draw.random() < 0.2, draw.random() < 0.6, draw.randint(1, 3)
    given = tuple(microbatch(draw, slices, packed, batch, vectors) for _ in range(microbatches))
    split_head = draw.random() < 0.5
    split_embedding = split_head and not vectors and draw.random() < 0.7
    exchange = draw.random() < 0.5
    settings = {"split_head": split_head, "split_embedding": split_embedding, "slack": draw.choice([1, 2])}
    settings["split_backward"] = draw.random() < 0.4
    settings["exchange"] = ExchangeRule(forced=True, limit=draw.choice([0, 1, 2])) if exchange else None
    settings["work"] = Work(attention=draw.choice([0.0, 1.0, 5.0]))
    least = stages * chunks
    build = Tiny(
        layers=least * draw.randint(1, 2) if exchange else draw.randint(least, least + 3),
        pointwise=draw.random() < 0.4,
        tied=split_embedding and draw.random() < 0.5,
        drop=draw.choice([0.0, 0.2]),
    )
    return Case(build, given, settings, {"recompute": draw.choice(["none", "full"])})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_pipelines_have_the_gradients_of_one_process(seed):
    draw = random.Random(seed)
    stages, chunks, microbatches = draw.choice([1, 2, 2, 3, 4]), draw.choice([1, 2, 3]), draw.randint(1, 4)
    shape = (stages, chunks, microbatches, draw.randint(stages, 12))
    require_equal(shape, [case(draw, *shape) for _ in range(CASES)])
