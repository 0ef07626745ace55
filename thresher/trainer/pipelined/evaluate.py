"""Measures a model that is cut into stages: forward only, through the pipeline."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.data.batch import Batch
from thresher.data.reader import Reader
from thresher.pipeline.parallel.mesh import PipelineMesh
from thresher.pipeline.runtime.runtime import PipelineRuntime
from thresher.pipeline.vocabulary.rows import row_range
from thresher.trainer.callbacks.base import EvalRecord
from thresher.trainer.metrics import RankingMetrics, TokenMetrics, target_ranks
from thresher.trainer.metrics.retrieval import ItemChunk
from thresher.trainer.model import Sequencer
from thresher.trainer.pipelined.cut import Cutter
from thresher.trainer.world import World

ROWS = 1 << 14
"""Of the output layer, looked at together when items are ranked."""


@dataclass(frozen=True)
class PipelinedEvaluator:
    """Evaluates on the rows of a reader; collective: all ranks call :meth:`run` together.

    Attributes:
        likelihood: see :class:`TokenMetrics`.
        at: cut-offs k of HR@k and NDCG@k.
    """

    runtime: PipelineRuntime
    mesh: PipelineMesh
    sequencer: Sequencer
    cutter: Cutter
    likelihood: bool
    at: tuple[int, ...]
    world: World

    def run(self, reader: Reader, split: str, step: int, max_rows: int = 0) -> EvalRecord:
        """One pass over the split."""
        start = time.perf_counter()
        metrics = self._measure(batch.to(self.world.device) for batch in reader.sweep(max_rows))
        rows = min(max_rows or reader.rows, reader.rows)
        return EvalRecord(step, split, rows, time.perf_counter() - start, metrics)

    def names(self) -> list[str]:
        """Names of the metrics that :meth:`run` measures. Collective."""
        return list(self._measure(iter(())))

    def _measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        tokens, queries = TokenMetrics(self.likelihood), _Queries([], [], [])
        for batch in batches:
            samples = self.sequencer.sequences(batch, per_token=True)
            last = self.sequencer.last(batch)
            microbatches, firsts = self.cutter.cut(samples, last + 1)
            wanted = self.sequencer.has_target
            outcome = self.runtime.evaluate(microbatches, total_weight=1.0, keep_hidden=wanted)
            if self._is_last:
                tokens.update(outcome.loss, samples.weights.sum())
            if outcome.hidden:
                queries.add(newest_states(outcome.hidden, firsts, last), batch, self.sequencer)
        found = self._ranked(queries) if self.sequencer.has_target else {}
        return found | tokens.compute(self.world.group)

    @property
    def _is_last(self) -> bool:
        return self.mesh.rank == self.mesh.stages - 1

    def _ranked(self, queries: "_Queries") -> dict[str, float]:
        metrics = RankingMetrics(self.at)
        if self._is_last and queries.targets:
            wanted = torch.cat(queries.targets)
            vectors = _picked(self._items(), wanted, self.runtime.parts.width)
            first = self.sequencer.first_item
            ranks = target_ranks(torch.cat(queries.states), wanted, vectors, self._items(), first_item=first)
            metrics.update(ranks, torch.cat(queries.weights))
        else:
            for _ in range(2):
                list(self._items())
        return metrics.compute(self.world.group)

    def _items(self) -> Iterator[ItemChunk]:
        """Rows of the output layer, some at a time, from the ranks that hold them. Collective over the pipeline."""
        shape, head = self.runtime.schedule.shape, self.runtime.parts.head
        parts = shape.stages if shape.split_head else 1
        for part in range(parts):
            first, last = row_range(self.runtime.parts.vocabulary, parts, part)
            for start in range(first, last, ROWS):
                stop = min(start + ROWS, last)
                if head is not None and part == (self.mesh.rank if parts > 1 else 0):
                    rows = head.weight.detach()[start - first : stop - first].contiguous()
                elif parts > 1:
                    rows = torch.empty(stop - start, self.runtime.parts.width, dtype=self.runtime.parts.dtype)
                    rows = rows.to(self.world.device)
                else:
                    return
                if parts > 1:
                    dist.broadcast(rows, group=self.mesh.pipeline, group_src=part)
                yield start, rows.float()


@dataclass(frozen=True)
class _Queries:
    """What was asked: outputs at the newest items [n, D], rows to be found [n], weights [n], batch by batch."""

    states: list[Tensor]
    targets: list[Tensor]
    weights: list[Tensor]

    def add(self, states: Tensor, batch: Batch, sequencer: Sequencer) -> None:
        self.states.append(states.float())
        self.targets.append(sequencer.target(batch))
        self.weights.append(batch.weight)


def newest_states(hidden: Sequence[Tensor], firsts: Tensor, last: Tensor) -> Tensor:
    """[B, D] of outputs by microbatch: those at places ``last`` [B] of samples; zeros where there is none (below 0).

    Args:
        firsts: see :class:`Cut`.
    """
    chosen = torch.cat([states.flatten(0, 1) for states in hidden])[firsts + last.clamp(min=0)]
    return torch.where((last >= 0).unsqueeze(1), chosen, 0.0)


def _picked(chunks: Iterator[ItemChunk], rows: Tensor, width: int) -> Tensor:
    """[n, D]: the vectors of ``rows`` [n]."""
    vectors = torch.zeros(len(rows), width, device=rows.device)
    for start, values in chunks:
        here = (rows >= start) & (rows < start + len(values))
        vectors[here] = values[rows[here] - start]
    return vectors
