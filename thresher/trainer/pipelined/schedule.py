"""Which schedule a run follows, and what keeps it from having one: told before the first step."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from thresher.embeddings.optimizers import TableOptimizer
from thresher.errors import ConfigError
from thresher.pipeline.context import TrunkBuilder
from thresher.pipeline.layout import even_bounds
from thresher.pipeline.runtime.stage import require_tied_together
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.exchange import ExchangeRule
from thresher.pipeline.schedule.ops import Schedule
from thresher.pipeline.schedule.work import Work
from thresher.pipeline.simulate.costs import Term, balanced_bounds, causal_pairs
from thresher.trainer.config import RunConfig
from thresher.trainer.pipelined.config import PipelineConfig
from thresher.trainer.pipelined.cut import Cutter, PackedCutter, PaddedCutter


def slice_bounds(config: PipelineConfig, length: int, rows: int, attention: float) -> tuple[int, ...]:
    """Where sequences are cut; of packed ones, where a microbatch is cut if all are as long as may be.

    Args:
        length: tokens of the longest sequence.
        rows: samples of a microbatch.
        attention: work of attention over a whole sequence over that of all else.

    Raises:
        ConfigError: there are too few tokens.
    """
    is_packed = config.packing == "packed"
    tokens = length * rows if is_packed else length
    if tokens < config.slices:
        what = "microbatches" if is_packed else "sequences"
        raise ConfigError(
            f"{what} of {tokens} tokens cannot be cut into {config.slices} slices",
            where="pipeline.slices",
            fix=f"use at most {tokens} slices, or raise model.max_length (and the length of the data)",
        )
    if is_packed or config.slice_bounds == "even":
        return even_bounds(tokens, config.slices)
    try:
        return balanced_bounds(tokens, config.slices, Term(1.0, _per_pair(attention, tokens)))
    except ValueError as error:
        raise ConfigError(
            str(error), where="pipeline.slice_bounds", fix="use fewer slices, or slice_bounds: even"
        ) from None


def cutter_of(config: PipelineConfig, bounds: tuple[int, ...], length: int, attention: float) -> Cutter:
    """Makes microbatches of samples; arguments as for :func:`slice_bounds`, which gave ``bounds``."""
    if config.packing == "padded":
        return PaddedCutter(config.microbatches, bounds)
    per_pair = _per_pair(attention, length) if config.slice_bounds == "balanced" else 0.0
    return PackedCutter(config.microbatches, config.slices, per_pair)


def _per_pair(attention: float, tokens: int) -> float:
    """Work on a pair of tokens over all work on a token but attention."""
    return attention * tokens / causal_pairs(0, tokens)


def schedule_of(config: PipelineConfig, trunk: TrunkBuilder, bounds: tuple[int, ...], attention: float) -> Schedule:
    """What every rank does.

    Args:
        attention: as for :func:`slice_bounds`.

    Raises:
        ConfigError: the layers cannot be cut for an exchange.
        ScheduleError: there is no such schedule, or a tied output layer would be on another rank than its embedding.
    """
    stages = config.stages * config.chunks
    if config.exchange != "off" and trunk.layers % stages:
        raise ConfigError(
            f"{trunk.layers} layers on {stages} stages are unequal, but ranks that share attention go through their "
            "layers together",
            where="pipeline.exchange",
            fix=f"use a multiple of {stages} layers, or exchange: off",
        )
    schedule = build_schedule(
        config.stages,
        config.chunks,
        config.microbatches,
        config.slices,
        config.slack,
        config.policy,
        split_embedding=config.split_embedding,
        split_head=config.split_head,
        split_backward=config.split_backward,
        exchange=_rule(config),
        work=Work(attention, tuple(float(stop - start) for start, stop in pairwise(bounds))),
    )
    require_tied_together(trunk, schedule.shape)
    return schedule


def _rule(config: PipelineConfig) -> ExchangeRule | None:
    if config.exchange == "off":
        return None
    return ExchangeRule(limit=0 if config.exchange == "auto" else config.exchange)


def require_plain(config: RunConfig[Any]) -> None:
    """Refuses settings of tables: in a pipeline the embedding is part of the dense model.

    Raises:
        ConfigError: names the first such setting.
    """
    given: dict[str, Callable[[], bool]] = {
        "tiers": lambda: config.tiers.enabled,
        "fields": lambda: config.fields.enabled,
        "dynamic": lambda: bool(config.dynamic),
        "sharding.plan": lambda: bool(config.sharding.plan),
        "sharding.tables": lambda: bool(config.sharding.tables),
        "optim.tables": lambda: config.optim.tables != TableOptimizer(),
    }
    for name, is_set in given.items():
        if is_set():
            raise ConfigError(
                "is about sharded tables, of which a pipeline has none",
                where=name,
                fix="leave it out, or train without the pipeline section",
            )
