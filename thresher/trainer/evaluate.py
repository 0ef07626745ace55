"""Measures a model on one split: every row once, exact over the ranks."""

import time
from collections.abc import Iterator

import torch
from torch import nn

from thresher.data.batch import Batch
from thresher.data.reader import Reader
from thresher.data.schema import Schema
from thresher.trainer.callbacks.base import EvalRecord
from thresher.trainer.config import EvalConfig, TrainConfig
from thresher.trainer.metrics import (
    BinaryMetrics,
    RankingMetrics,
    RegressionMetrics,
    TokenMetrics,
    item_chunks,
    target_ranks,
)
from thresher.trainer.model import Model, Ranker, Retriever, SequenceModel
from thresher.trainer.step import autocast
from thresher.trainer.world import World


class Evaluator:
    """Evaluates a model on the rows of a reader; collective: all ranks call :meth:`run` together.

    Args:
        wrapped: the model as the ranks run it together; called for the forward.
        model: the same model without wrappers.
        max_rows: upper bound on the rows used; 0 for all.
    """

    def __init__(
        self, wrapped: nn.Module, model: Model, schema: Schema, train: TrainConfig, settings: EvalConfig, world: World
    ) -> None:
        self._wrapped, self._model, self._schema = wrapped, model, schema
        self._train, self._settings, self._world = train, settings, world

    def run(self, reader: Reader, split: str, step: int, max_rows: int = 0) -> EvalRecord:
        """One pass over the split."""
        start = time.perf_counter()
        was_training = self._wrapped.training
        self._wrapped.eval()
        with torch.no_grad(), autocast(self._train, self._world.device):
            batches = (batch.to(self._world.device) for batch in reader.sweep(max_rows))
            metrics = self._measure(batches)
        self._wrapped.train(was_training)
        rows = min(max_rows or reader.rows, reader.rows)
        return EvalRecord(step, split, rows, time.perf_counter() - start, metrics)

    def names(self) -> list[str]:
        """Names of the metrics that :meth:`run` measures. Collective."""
        if isinstance(self._model, Ranker):
            return list(self._rank(self._model, iter(())))
        found = RankingMetrics(self._settings.at).compute(self._world.group)
        tokens = self._predict(self._model, iter(())) if isinstance(self._model, SequenceModel) else {}
        return list(found | tokens) if isinstance(self._model, Retriever) else list(tokens)

    def _measure(self, batches: Iterator[Batch]) -> dict[str, float]:
        if isinstance(self._model, Ranker):
            return self._rank(self._model, batches)
        if isinstance(self._model, Retriever):
            return self._retrieve(self._model, batches)
        if isinstance(self._model, SequenceModel):
            return self._predict(self._model, batches)
        raise TypeError(f"{type(self._model).__name__} is no Ranker, Retriever or SequenceModel")

    def _predict(self, model: SequenceModel, batches: Iterator[Batch]) -> dict[str, float]:
        metrics = TokenMetrics(model.is_likelihood)
        for batch in batches:
            metrics.update(*model.token_loss(batch))
        return metrics.compute(self._world.group)

    def _rank(self, model: Ranker, batches: Iterator[Batch]) -> dict[str, float]:
        grouped = self._schema.group is not None
        tasks = {label.name: label.task for label in self._schema.labels}
        columns = {label.name: column for column, label in enumerate(self._schema.labels)}
        binary = {name: BinaryMetrics(grouped) for name in model.labels if tasks[name] == "binary"}
        values = {name: RegressionMetrics() for name in model.labels if tasks[name] == "regression"}
        for batch in batches:
            outputs = self._wrapped(batch)
            for name, collected in binary.items():
                collected.update(outputs[name].float(), batch.labels[:, columns[name]], batch.weight, batch.group)
            for name, errors in values.items():
                errors.update(outputs[name].float(), batch.labels[:, columns[name]], batch.weight)
        found: dict[str, float] = {}
        for name in model.labels:
            metrics = (binary.get(name) or values[name]).compute(self._world.group)
            prefix = "" if name == model.labels[0] else f"{name}/"
            found |= {f"{prefix}{metric}": value for metric, value in metrics.items()}
        return found

    def _retrieve(self, model: Retriever, batches: Iterator[Batch]) -> dict[str, float]:
        """Queries of the whole split first, then one pass over the items, whose lookup is collective."""
        queries, targets, weights = [], [], []
        tokens = TokenMetrics(model.is_likelihood) if isinstance(model, SequenceModel) else None
        for batch in batches:
            if tokens is not None and isinstance(model, SequenceModel):
                tokens.update(*model.token_loss(batch))
            queries.append(model.queries(batch).float())
            targets.append(model.target(batch))
            weights.append(batch.weight)
        wanted = torch.cat(targets)
        vectors = torch.cat([model.items(part).float() for part in targets])
        chunks = item_chunks(model, self._world.device)
        ranks = target_ranks(torch.cat(queries), wanted, vectors, chunks, first_item=model.first_item)
        metrics = RankingMetrics(self._settings.at)
        metrics.update(ranks, torch.cat(weights))
        found = metrics.compute(self._world.group)
        return found if tokens is None else found | tokens.compute(self._world.group)
